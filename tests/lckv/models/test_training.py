"""Training: gradient checkpointing, the stages of merging, its noise and its loss, and transformers'
Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.base import KeyValue, TokenContext
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dense.policy import DensePolicy
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import CYCLIC, MAPS, MERGING, PLAIN, SHARED, TWO_GROUPS, close, model, tokens

RETROFIT = DMCConfig(
    stage="retrofit", initial_decision_bias=0.25, temperature=1.0, target_compression_ratio=4.0
)


def trained(one: LCKVLlamaForCausalLM, seed: int = 7) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch with padding in it."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, 9:] = mask[1, :4] = 0
    one.train().zero_grad()
    torch.manual_seed(seed)
    loss = one(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in one.named_parameters()}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", [None, RETROFIT, DMCConfig(stage="zero_out")])
@pytest.mark.parametrize("layer_types", [SHARED, CYCLIC, TWO_GROUPS])
def test_checkpointing_changes_nothing(layer_types: str, policy: DMCConfig | None, reentrant: bool) -> None:
    one = model(layer_types, policy, forward_passes=2)
    loss, gradients = trained(one)
    one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    inner: list[int] = []
    inside = one.model.layers[0 if layer_types == TWO_GROUPS else 1]
    inside.register_forward_pre_hook(lambda *_: runs.append(1))
    inside.mlp.register_forward_pre_hook(lambda *_: inner.append(1))
    again, same = trained(one)
    # Hooks see every use once, as in Llama; recomputing is inside of them.
    assert len(runs) == (1 if layer_types == SHARED else 2 + 2)
    # Passes without gradient are not recomputed, the others are.
    assert len(inner) == (2 if layer_types == SHARED else 2 + 2 * 2)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        close(same[name], gradient, 1e-6 * max(1.0, gradient.abs().max().item()))
        assert gradient.isfinite().all()
        assert gradient.count_nonzero() > 0


def test_noise_follows_the_seed() -> None:
    one = model(CYCLIC, RETROFIT)
    loss, gradients = trained(one, seed=1)
    again, same = trained(one, seed=1)
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())
    assert (trained(one, seed=2)[0] - loss).abs() > 1e-4
    twice = one(tokens(1, 12).repeat(2, 1)).logits
    assert (twice[0] - twice[1]).abs().max() > 0.1  # rows draw their own


def test_evaluation_has_no_noise_and_hard_decisions() -> None:
    one, ids = model(SHARED, RETROFIT), tokens(2, 12)
    logits = one(ids).logits
    assert torch.equal(one(ids).logits, logits)
    assert (one.train()(ids).logits - logits).abs().max() > 0.1


def test_auxiliary_loss() -> None:
    one, ids = model(SHARED, RETROFIT), tokens(2, 12)
    one.eval()
    evaluated = one(ids, labels=ids)
    assert evaluated.auxiliary_loss > 0
    close(
        evaluated.loss,
        torch.nn.functional.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    )
    output = one.train()(ids, labels=ids)
    entropy = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(output.loss, entropy + output.auxiliary_loss)
    close(output.auxiliary_loss, torch.relu(0.75 - output.statistics["merge_rate"].mean((0, 2))).mean())
    (gradient,) = torch.autograd.grad(output.auxiliary_loss, one.model.layers[2].self_attn.k_proj.weight)
    deciding = gradient.view(2, 8, -1)[:, -1]
    assert deciding.count_nonzero() == deciding.numel()
    assert gradient.view(2, 8, -1)[:, :-1].count_nonzero() == 0


def test_a_row_of_padding_costs_nothing() -> None:
    one, ids = model(SHARED, RETROFIT).train(), tokens(2, 12)
    mask = torch.tensor([[1] * 12, [0] * 12])
    output = one(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    close(output.auxiliary_loss, torch.relu(0.75 - output.statistics["merge_rate"][:, 0].mean()))
    assert one(ids, attention_mask=torch.zeros_like(mask)).auxiliary_loss == 0


def test_auxiliary_loss_of_accumulated_micro_batches() -> None:
    """The sum of losses is the loss of the whole batch: each row's share is that of its targets."""
    one, ids = model(SHARED, MERGING).train(), tokens(2, 12)
    labels = ids.clone()
    labels[1, 7:] = -100
    parts = []
    for row in range(2):
        part = slice(row, row + 1)
        torch.manual_seed(row)
        output = one(ids[part], labels=labels[part], num_items_in_batch=torch.tensor(17))
        entropy = torch.nn.functional.cross_entropy(
            output.logits[0, :-1], labels[row, 1:], ignore_index=-100, reduction="sum"
        )
        parts.append((output.loss, entropy / 17 + output.auxiliary_loss * (11, 6)[row] / 17))
    for found, expected in parts:
        close(found, expected)


@pytest.mark.parametrize("of_loss", [{}, {"num_items_in_batch": 17}, {"ignore_index": 3}], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_without_logits_is_the_loss(of_loss: dict[str, int], shifted: bool) -> None:
    """Gradients included, and the policy's auxiliary loss."""
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[1, 7:] = of_loss.get("ignore_index", -100)
    given = {**of_loss, **({"shift_labels": labels.roll(-1, 1)} if shifted else {})}
    found = []
    for skip in (False, True):
        one = model(SHARED, MERGING).train()
        torch.manual_seed(1)
        output = one(ids, labels=labels, skip_logits=skip, **given)
        assert (output.logits is None) == skip
        output.loss.backward()
        found.append((output.loss, {name: each.grad for name, each in one.named_parameters()}))
    (expected, gradients), (loss, same) = found
    close(loss, expected)
    for name, gradient in gradients.items():
        # Entries are sums, whose rounding is that of their largest terms.
        tolerance = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(same[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_logits_are_skipped_for_a_loss_of_a_plain_head_only() -> None:
    one, ids = model(SHARED), tokens(1, 6)
    with pytest.raises(ValueError, match="skip_logits is true, and there are no labels"):
        one(ids, skip_logits=True)
    with pytest.raises(RuntimeError, match="a label is negative and not ignore_index"):
        one(ids, labels=ids - 50, skip_logits=True)
    one.lm_head = torch.nn.Sequential(one.lm_head)  # as an adapter's
    with pytest.raises(ValueError, match="skip_logits is true, and lm_head is Sequential"):
        one(ids, labels=ids, skip_logits=True)


def test_zero_out_is_a_plain_model_without_the_last_channel() -> None:
    """Its fading is over here: training from transformers has no schedule."""
    one, plain = model(SHARED, DMCConfig(stage="zero_out")), model(SHARED)
    with torch.no_grad():
        for layer in plain.model.layers:
            for name in ("q_proj", "k_proj"):
                projection = getattr(layer.self_attn, name, None)
                if projection is not None:
                    projection.weight.view(-1, 8, 32)[:, -1] = 0
    ids = tokens(2, 9)
    output = one.train()(ids, labels=ids)
    assert output.auxiliary_loss is None
    assert output.statistics is None
    # Rotation moves a part of the partner channel into the last one, where it is dropped.
    for layer in plain.model.layers:
        layer.self_attn.policy = Dropping(DenseConfig())
    close(output.logits, plain(ids).logits)


class Dropping(DensePolicy):
    """Plain attention without the last channel of queries and keys."""

    def query(self, query: Tensor, context: TokenContext, kv_heads: int | None = None) -> Tensor:
        return self._dropped(super().query(query, context))

    def keys_values(self, *args: Any) -> Any:
        (key, value), _ = super().keys_values(*args)
        return KeyValue(self._dropped(key), value), ()

    @staticmethod
    def _dropped(heads: Tensor) -> Tensor:
        return torch.cat((heads[..., :-1], torch.zeros_like(heads[..., :1])), -1)


@pytest.mark.parametrize("layer_types", MAPS)
def test_every_parameter_learns(layer_types: str | None) -> None:
    one = model(layer_types, backward_passes=2, forward_passes=1)
    optimizer = torch.optim.AdamW(one.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss, gradients = trained(one)
        assert all(gradient.count_nonzero() > 0 for gradient in gradients.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_dropout_is_for_training_only() -> None:
    one, ids = model(SHARED, attention_dropout=0.5), tokens(2, 8)
    for implementation in ("sdpa", "eager"):
        one.set_attn_implementation(implementation)
        close(one.eval()(ids).logits, model(SHARED)(ids).logits)
        assert (one.train()(ids).logits - one(ids).logits).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("layer_types", "policy"), [(PLAIN, None), (CYCLIC, RETROFIT)])
def test_trainer(tmp_path: Path, layer_types: str | None, policy: DMCConfig | None) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1, save_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    one = model(layer_types, policy)
    trainer = Trainer(one, arguments, train_dataset=data, eval_dataset=data, compute_metrics=lambda results: {
        "shape": results.predictions.shape
    })  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_shape"] == (8, 10, 61)
    saved = LCKVLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in one.state_dict().items())

"""The model as a whole: against Megatron's own, documents, padding, tied weights, chunks, recomputation with
dropout."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.config import CompressionConfig
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.model.initialization import global_parameters
from megatron_ext.model.norm import RMSNorm
from tests.megatron_ext.model.stages import EVERY_MAP, MAPS, VOCAB, draw_tokens, make_stage, positions_of
from tests.ranks import run_on_ranks

FP32 = TrainConfig(precision="fp32")


@pytest.mark.parametrize(
    "options", [{}, {"add_qkv_bias": True, "qk_layernorm": True}], ids=["llama", "bias-and-norm"]
)
def test_a_plain_map_is_megatrons_gpt_model(options: dict[str, bool]) -> None:
    ((loss, theirs, difference, gradient),) = run_on_ranks(1, compare_with_megatron, options)
    assert loss == pytest.approx(theirs, rel=1e-6)
    assert difference < 1e-5
    assert gradient < 1e-5


def compare_with_megatron(options: dict[str, bool]) -> tuple[float, float, float, float]:
    """Loss of both, largest difference of logits, largest relative difference of gradients; parameters are
    loaded by name."""
    ours = make_stage(MAPS["plain"], **options)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=options.get("qk_layernorm", False))
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    if options.get("qk_layernorm"):
        heads = spec.submodules.self_attention.submodules
        heads.q_layernorm = heads.k_layernorm = RMSNorm
    theirs = GPTModel(
        replace(ours.config, use_te_activation_func=False),  # their own SwiGLU
        spec,
        vocab_size=ours.padded_vocab_size,
        max_sequence_length=16,
        position_embedding_type="rope",
    )
    theirs.load_state_dict(ours.state_dict())
    tokens = draw_tokens(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    positions = positions_of(tokens)
    difference = (ours(tokens, positions)[0] - theirs(tokens, positions, mask))[..., :VOCAB].abs().max()
    ours.padded_vocab_size = ours.vocab_size = theirs.vocab_size  # Megatron gives padding a probability
    total = ours(tokens, positions, tokens)[0].total
    losses = total / tokens.numel(), theirs(tokens, positions, mask, labels=tokens).mean()
    for loss in losses:
        loss.backward()
    named = dict(theirs.named_parameters())
    gradient = max(
        ((mine.grad - named[name].grad).abs().max() / named[name].grad.abs().max()).item()
        for name, mine in ours.named_parameters()
    )
    return losses[0].item(), losses[1].item(), difference.item(), gradient


@pytest.mark.parametrize("name", EVERY_MAP)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_documents_are_separate_documents(name: str, backend: str) -> None:
    (errors,) = run_on_ranks(1, compare_documents, name, backend)
    assert errors["loss"] < 2e-5
    assert errors["gradient"] < 1e-4


def compare_documents(name: str, backend: str) -> dict[str, float]:
    stage = make_stage(EVERY_MAP[name], attention_backend=backend)
    tokens, lengths = draw_tokens(2, 18), [[7, 11], [18]]
    starts = [0, 7, 18, 36]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = stage(tokens, positions, tokens, Documents(torch.tensor(starts, dtype=torch.int32)))[0]
    packed.total.backward()
    gradients = take_gradients(stage)
    flat, found = tokens.flatten(), []
    for start, stop in pairwise(starts):
        document = flat[None, start:stop]
        losses = stage(document, positions_of(document), document)[0]
        losses.total.backward()
        found.append(losses.losses.flatten())
    separate = take_gradients(stage)
    gradient = max(relative(gradients[key], separate[key]) for key in gradients)
    return {"loss": (packed.losses.flatten() - torch.cat(found)).abs().max().item(), "gradient": gradient}


def take_gradients(stage: torch.nn.Module) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.grad = None
    return gradients


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("name", EVERY_MAP)
def test_readers_have_no_key_value_weights_and_every_parameter_gets_a_gradient(name: str) -> None:
    (missing,) = run_on_ranks(1, parameters_without_gradient, name)
    assert missing == []


def parameters_without_gradient(name: str) -> list[str]:
    stage = make_stage(EVERY_MAP[name])
    tokens = draw_tokens(2, 9)
    stage(tokens, positions_of(tokens), tokens)[0].total.backward()
    owners = stage.config.layer_types.kv_layers
    for layer in stage.decoder.layers:
        index = layer.layer_number - 1
        assert hasattr(layer.self_attention, "linear_qkv") == (index in owners)
        assert hasattr(layer.self_attention, "linear_q") == (index not in owners)
    return [key for key, parameter in stage.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", ["yoco", "lckv", "chain"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_repeats_dropout(name: str, granularity: str) -> None:
    ((plain, recomputed),) = run_on_ranks(1, gradients_with_dropout, name, granularity)
    assert plain.keys() == recomputed.keys()
    for key in plain:  # not bit-equal: gradients of several passes are added up in another order
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-5, atol=1e-5)


def gradients_with_dropout(name: str, granularity: str) -> list[dict[str, Tensor]]:
    found = []
    for recompute in ("none", granularity):
        train = TrainConfig(
            precision="fp32", recompute_granularity=recompute, recompute_modules=("core_attn", "mlp")
        )
        stage = make_stage(MAPS[name], train=train, attention_dropout=0.2, hidden_dropout=0.3)
        tokens = draw_tokens(2, 9)
        torch.manual_seed(5)
        stage(tokens, positions_of(tokens), tokens)[0].total.backward()
        found.append(take_gradients(stage))
        from megatron_ext.parallel.process_groups import parallel_state

        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_initial_weights_and_losses_do_not_depend_on_the_layout(layout: tuple[int, int], tied: bool) -> None:
    tp, pp = layout
    expected = run_on_ranks(1, initial_losses, 1, 1, tied)[0]
    for found in run_on_ranks(tp * pp, initial_losses, tp, pp, tied):
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def initial_losses(tp: int, pp: int, tied: bool) -> Tensor | None:
    """Losses of each token, through compute_logits; None on ranks that are not of the last stage."""
    from megatron_ext.evaluation.logits import compute_logits

    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    stage = make_stage(MAPS["yoco"], parallel, untie_embeddings_and_output_weights=not tied).eval()
    tokens = draw_tokens(2, 8)
    logits = compute_logits(stage, tokens)
    if logits is None:
        return None
    assert logits.shape == (2, 8, VOCAB)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def test_padding_of_the_vocabulary_has_no_probability() -> None:
    run_on_ranks(1, check_padding)


def check_padding() -> None:
    stage = make_stage(MAPS["plain"], make_vocab_size_divisible_by=128)
    tokens = draw_tokens(1, 8)
    logits, _ = stage(tokens, positions_of(tokens))
    assert logits.shape[-1] == 128
    assert logits.softmax(-1)[..., VOCAB:].max() == 0
    losses, _ = stage(tokens, positions_of(tokens), tokens)
    expected = torch.nn.functional.cross_entropy(
        logits[..., :VOCAB].transpose(1, 2), tokens, reduction="none"
    )
    torch.testing.assert_close(losses.losses, expected)
    losses.total.backward()
    assert stage.output_layer.weight.grad[VOCAB:].eq(0).all()


def test_bfloat16_runs_close_to_float32() -> None:
    run_on_ranks(1, check_bfloat16)


def check_bfloat16() -> None:
    from megatron_ext.model.build import wrap
    from megatron_ext.parallel.process_groups import parallel_state

    tokens, found = draw_tokens(2, 16), []
    for precision in ("fp32", "bf16"):
        train = TrainConfig(precision=precision)
        stage = make_stage(MAPS["lckv"], train=train, init_method_std=0.05)
        model = wrap(stage, ParallelConfig(), train)
        found.append(model(tokens, positions_of(tokens), tokens)[0].losses)
        assert stage.angles(torch.arange(16), 16).cos.dtype == torch.float32
        parallel_state.destroy_model_parallel()
    torch.testing.assert_close(found[1].float(), found[0], rtol=0.02, atol=0.02)
    assert {parameter.dtype for _, parameter in global_parameters(stage)} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["lckv", "lckv x dmc", "yoco x dmc"])
def test_no_query_sees_the_future(name: str) -> None:
    """Changing a token changes no loss before it, in training and in evaluation."""
    for differences in run_on_ranks(1, differences_before_a_change, name):
        assert differences == [0.0, 0.0]


def differences_before_a_change(name: str) -> list[float]:
    stage, found = make_stage(EVERY_MAP[name]), []
    tokens = draw_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % VOCAB
    for training in (True, False):
        stage.train(training)
        with torch.no_grad():
            one, other = (stage(some, positions_of(some))[0][..., :VOCAB] for some in (tokens, changed))
        assert (one[:, 7:] - other[:, 7:]).abs().max() > 1e-3
        found.append((one[:, :7] - other[:, :7]).abs().max().item())
    return found


def test_merging_nothing_after_stage_1_is_the_dense_model() -> None:
    """With a decision bias that no logit reaches, a model whose decision channel is zeroed equals the dense
    one."""
    run_on_ranks(1, check_merging_nothing)


def check_merging_nothing() -> None:
    from megatron_ext.model.channel_rows import StageChannelRows
    from megatron_ext.parallel.process_groups import parallel_state

    policies = {"dense": DenseConfig(), "dmc": DMCConfig(stage="finetune", initial_decision_bias=1e4)}
    tokens, losses = draw_tokens(2, 16), {}
    for name, policy in policies.items():
        stage = make_stage(CompressionConfig(layer_types="0_0_2_2_4_5", policy=policy))
        with torch.no_grad():
            for kind in ("query", "key"):
                for row in StageChannelRows(stage)(kind, -1):
                    row.zero_()
        losses[name] = stage.eval()(tokens, positions_of(tokens), tokens)[0].losses
        parallel_state.destroy_model_parallel()
    torch.testing.assert_close(
        losses["dmc"], losses["dense"], rtol=1e-4, atol=1e-4
    )  # a mean of one still rounds

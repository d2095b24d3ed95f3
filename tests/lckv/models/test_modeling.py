"""The model on padded, packed and continued batches, and what it returns and refuses."""

import pytest
import torch
from torch import Tensor

from lckv.models.cache import CACHE_NAME, LCKVCache
from lckv.models.layers import Tokens
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM, LCKVLlamaModel
from lckv.models.tokens import Layout
from lckv.policies.base import Extension
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import CYCLIC, MAPS, MERGING, SHARED, close, model, tokens

ANY = [
    (layer_types, policy)
    for layer_types in MAPS
    for policy in (None, MERGING)
    if not (policy and "s" in str(layer_types))
]
any_model = pytest.mark.parametrize(("layer_types", "policy"), ANY)


def padded(rows: list[Tensor], left: list[int], width: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [rows, width] with `left[i]` columns of padding before row i."""
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for index, (row, before) in enumerate(zip(rows, left, strict=True)):
        ids[index, before : before + len(row)] = row
        mask[index, before : before + len(row)] = 1
    return ids, mask


ROWS = [tokens(1, length, seed=length)[0] for length in (9, 4, 1, 6)]
LEFT = [0, 5, 8, 1]  # with the first row on neither side, the second and third on the left, the last on both


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@any_model
def test_padding_changes_nothing(
    layer_types: str | None, policy: DMCConfig | None, implementation: str
) -> None:
    one = model(layer_types, policy)
    one.set_attn_implementation(implementation)
    ids, mask = padded(ROWS, LEFT, 9)
    with torch.no_grad():
        alone = [one(row[None], use_cache=False).logits[0] for row in ROWS]
        for use_cache in (False, True):
            logits = one(ids, attention_mask=mask, use_cache=use_cache).logits
            assert logits.isfinite().all()
            for index, expected in enumerate(alone):
                close(logits[index, mask[index].bool()], expected)


@any_model
def test_packed_rows_are_what_they_are_alone(layer_types: str | None, policy: DMCConfig | None) -> None:
    one = model(layer_types, policy)
    lengths = [[4, 1, 5], [7, 3]]
    ids = tokens(2, 10)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = one(ids, position_ids=positions, use_cache=False).logits
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    (packed * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in one.named_parameters()}
    one.zero_grad()
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            part = slice(start, start + length)
            alone = one(ids[row : row + 1, part], use_cache=False).logits[0]
            close(packed[row, part], alone)
            (alone * weights[row, part]).sum().backward()
            start += length
    for name, parameter in one.named_parameters():
        close(gradients[name], parameter.grad, 2e-5 * max(1.0, parameter.grad.abs().max().item()))


def test_packed_rows_with_padding_behind_them() -> None:
    one = model(SHARED)
    ids = tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    logits = one(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    close(logits[:3], one(ids[:, :3]).logits[0])
    close(logits[3:6], one(ids[:, 3:6]).logits[0])


def test_positions_are_what_rotation_goes_by() -> None:
    one, ids = model(), tokens(1, 6)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11]])
    shifted = one(ids, position_ids=positions).logits
    close(shifted, one(ids, position_ids=positions + 20).logits)  # only distances count
    assert (shifted - one(ids).logits).abs().max() > 0.1
    close(one(ids, position_ids=torch.arange(6)[None]).logits, one(ids).logits)


@any_model
def test_a_cache_continues(layer_types: str | None, policy: DMCConfig | None) -> None:
    one, ids = model(layer_types, policy), tokens(2, 12)
    with torch.no_grad():
        expected, cache, parts = one(ids, use_cache=False).logits, None, []
        for part in ids.split((5, 1, 4, 1, 1), 1):
            output = one(part, past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
        close(torch.cat(parts, 1), expected, 1e-4)
        assert isinstance(cache, LCKVCache)
        assert cache.get_seq_length() == 12
        assert (
            one.model.run(one.model.embed_tokens(ids[:, :1]), cache.slots).passes == 1
        )  # exact for one token


@any_model
def test_a_padded_batch_continues_row_by_row(layer_types: str | None, policy: DMCConfig | None) -> None:
    """Tokens of a row may come in one call or several, and a row may have none for a while. Positions count
    tokens, as `generate` says; windows count columns, so that their rows are not what they are alone."""
    one = model(layer_types, policy)
    rows = [tokens(1, 9, seed=1)[0], tokens(1, 4, seed=2)[0], tokens(1, 6, seed=3)[0]]
    chunks = [([3, 0, 2], [0, 2, 1]), ([2, 2, 0], [1, 0, 0]), ([1, 1, 1], [0, 0, 0]), ([3, 1, 3], [2, 0, 1])]
    used, cache, found = [0, 0, 0], None, [[], [], []]
    every, mask = torch.zeros(2, 3, 0, dtype=torch.int64)
    with torch.no_grad():
        for counts, left in chunks:
            parts = [row[start : start + count] for row, start, count in zip(rows, used, counts, strict=True)]
            ids, new = padded(parts, left, max(map(sum, zip(counts, left, strict=True))))
            every, mask = torch.cat((every, ids), 1), torch.cat((mask, new), 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            output = one(
                ids,
                attention_mask=mask,
                position_ids=positions[:, -ids.shape[1] :],
                past_key_values=cache,
            )
            cache = output.past_key_values
            for index, count in enumerate(counts):
                used[index] += count
                found[index].append(output.logits[index, new[index].bool()])
        if policy is None:
            whole = one(every, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for index, (row, parts) in enumerate(zip(rows, found, strict=True)):
            if policy is None:
                close(torch.cat(parts), whole[index, mask[index].bool()], 1e-4)
            if "s" not in str(layer_types):
                close(torch.cat(parts), one(row[None], use_cache=False).logits[0], 1e-4)
    assert cache.slots.seen.tolist() == [9, 4, 6]


def test_iteration_of_the_caller() -> None:
    one, ids = model(CYCLIC, forward_passes=3, initializer_range=0.05), tokens(1, 12)
    embedded = one.model.embed_tokens(ids)
    exact = one.model.run(embedded, iteration=Iteration(12))
    assert exact.passes == 12
    asked: list[tuple[int, ...]] = []

    def converged(previous, current) -> bool:  # type: ignore[no-untyped-def]
        asked.append(tuple(current))
        return all((previous[layer].key - current[layer].key).abs().max() < 0.02 for layer in current)

    early = one.model.run(embedded, iteration=Iteration(12, converged))
    assert asked == [(3,)] * (early.passes - 2)
    assert 5 < early.passes < 12
    close(early.last_hidden_state, exact.last_hidden_state, 2e-2)
    assert one.model.run(embedded).passes == 5
    assert (one.model.run(embedded).last_hidden_state - exact.last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize("policy", [None, MERGING])
def test_first_pass_over_new_tokens_sees_older_ones_and_zeros(policy: DMCConfig | None) -> None:
    one, ids = model(CYCLIC, policy), tokens(1, 10)
    passes: list[Tensor] = []
    with torch.no_grad():
        caches = [one(ids[:, :5]).past_key_values.slots for _ in range(3)]
        embedded = one.model.embed_tokens(ids[:, 5:])
        committed: list[Tensor] = []
        for cache, iteration in zip(
            caches,
            (Iteration(1), Iteration(4, lambda previous, _: bool(passes.append(previous[3].key)))),
            strict=False,
        ):
            cache.commit = lambda extensions, _: committed.append(extensions[3].key)  # type: ignore[method-assign]
            one.model.run(embedded, cache, iteration=iteration)
        close(passes[0], committed[0])
        assert (passes[1] - passes[0]).abs().max() > 0.1
        # The plain computation: a cyclic layer reads keys and values of 0 beside those of the cache.
        zeros = Extension(*torch.zeros(2, 5, 1, 2, 8))
        positions = torch.arange(5, 10)[None]
        facts = Tokens(one.model._contexts(embedded, caches[2], Layout(), positions), Layout(), caches[2])
        states = embedded
        for layer in one.model.layers[:3]:
            states = layer(states, facts, "all", *(zeros if layer.self_attn.source == 3 else ()))[0]
        close(
            one.model.layers[3]
            .self_attn.keys_values(one.model.layers[3].input_layernorm(states), facts)[0]
            .key,
            passes[0],
        )


def test_a_map_that_hides_every_own_position() -> None:
    """The first token then sees nothing at all."""
    ids = tokens(1, 4)
    for hidden in (False, True):
        one = model(SHARED, force_nodiag=hidden)
        before = one(ids).logits
        with torch.no_grad():
            for layer in one.model.layers:
                layer.self_attn.o_proj.weight.neg_()
        change = (one(ids).logits - before).abs().amax((0, 2))
        assert (change[0] == 0) == hidden
        assert (change[1:] > 0.1).all()


def test_outputs() -> None:
    one, ids = model(CYCLIC), tokens(2, 6)
    output = one(ids)
    assert list(output.keys()) == ["logits", CACHE_NAME]
    assert output.past_key_values.get_seq_length() == 6
    assert list(one(ids, use_cache=False).keys()) == ["logits"]
    with_loss = one(ids, labels=ids)
    assert list(with_loss.keys()) == ["loss", "logits"]
    loss, logits = one(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, with_loss["loss"])
    assert torch.equal(logits, with_loss[1])
    one.config.return_dict = False
    assert torch.equal(one(ids, use_cache=False)[0], logits)


def test_loss_ignores_what_is_labelled_so() -> None:
    one, ids = model(), tokens(2, 7)
    labels = ids.clone()
    labels[0, :4] = labels[1, 5:] = -100
    output = one(ids, labels=labels)
    losses = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    used = labels[:, 1:] != -100
    close(output.loss, losses[used].mean())
    # What transformers' Trainer says of a batch of several micro-batches
    close(one(ids, labels=labels, num_items_in_batch=20).loss, losses[used].sum() / 20)


def test_hidden_states() -> None:
    one, ids = model(CYCLIC), tokens(2, 6)
    output = one(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    close(output.hidden_states[0], one.model.embed_tokens(ids))
    close(one.lm_head(output.hidden_states[-1]), output.logits)
    seen: list[Tensor] = []
    hook = one.model.layers[2].register_forward_hook(lambda _, __, result: seen.append(result[0]))
    one(ids)
    hook.remove()
    close(output.hidden_states[3], seen[-1])  # of the pass that counts
    assert one(ids).hidden_states is None
    one.config.output_hidden_states = True
    assert one(ids).hidden_states is not None


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(kept: int | Tensor) -> None:
    one, ids = model(), tokens(2, 6)
    whole = one(ids).logits
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    close(one(ids, logits_to_keep=kept).logits, expected)


def test_embeddings_instead_of_tokens() -> None:
    one, ids = model(), tokens(2, 6)
    close(one(inputs_embeds=one.model.embed_tokens(ids)).logits, one(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": one.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            one(**wrong)


def test_merge_rates_and_auxiliary_loss() -> None:
    one, ids = model(SHARED, MERGING), tokens(2, 20)
    output = one(ids, labels=ids)
    assert output.statistics["merge_rate"].shape == (2, 2, 2)
    assert 0.2 < output.statistics["merge_rate"].mean() < 0.6
    missing = torch.relu(0.5 - output.statistics["merge_rate"].mean((0, 2))).mean()
    close(output.auxiliary_loss, missing)
    cache = one(ids).past_key_values
    slots = torch.stack([cache.slots.lengths(layer) for layer in (0, 2)])
    close(slots / 20, 1 - output.statistics["merge_rate"])


def test_half_precision() -> None:
    for layer_types, policy in ANY:
        exact, ids = model(layer_types, policy), tokens(2, 12)
        half = model(layer_types, policy).bfloat16()
        with torch.no_grad():
            logits = half(ids, use_cache=False).logits
            assert logits.dtype == torch.bfloat16
            cache = half(ids[:, :8]).past_key_values
            continued = half(ids[:, 8:], past_key_values=cache).logits
        if policy is None:  # a decision that flips changes everything
            spread = exact(ids).logits.std()
            assert (logits - exact(ids).logits).std() < 0.1 * spread
            assert (continued - exact(ids).logits[:, 8:]).std() < 0.1 * spread
        else:
            assert continued.isfinite().all()
            assert cache.slots.state(half.model.layer_types.kv_layers[0]).dtype == torch.float32


def test_loads_as_the_base_model() -> None:
    one, ids = model(CYCLIC), tokens(1, 5)
    output = one.model(ids, use_cache=False)
    assert isinstance(one.model, LCKVLlamaModel)
    close(one.lm_head(output.last_hidden_state), one(ids).logits)


def test_cache_of_another_kind() -> None:
    from transformers import DynamicCache

    with pytest.raises(
        ValueError, match=rf"{CACHE_NAME} is a DynamicCache; .*pass an LCKVCache\(model.config\), or None"
    ):
        model()(tokens(1, 3), past_key_values=DynamicCache())


def test_cache_of_another_batch() -> None:
    one = model()
    cache = one(tokens(1, 3)).past_key_values
    with pytest.raises(ValueError, match="the batch has 2 rows, but its cache holds 1"):
        one(tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("asked", [{"use_cache": True}, {"past_key_values": None}])
def test_no_cache_in_training(asked: dict) -> None:
    one, ids = model(SHARED).train(), tokens(1, 4)
    if "past_key_values" in asked:
        asked = {"past_key_values": LCKVCache(one.config)}
    with pytest.raises(ValueError, match=f"use_cache is set, or {CACHE_NAME} given, in training"):
        one(ids, **asked)
    assert one(ids).past_key_values is None
    with (
        torch.no_grad()
    ):  # a model that generates between training steps, without being switched to evaluation
        assert one(ids, **asked).past_key_values.get_seq_length() == 4


def test_backends_that_are_not_there() -> None:
    one = model()
    one.config._attn_implementation = "of_nobody"
    with pytest.raises(
        ValueError,
        match=r"attn_implementation is 'of_nobody', but .* this model has eager, sdpa, flash_atten",
    ):
        one(tokens(1, 3))
    one.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError,
        match=r"attn_implementation is 'flash_attention_2', but .*needs CUDA .* Set attn_implementation to",
    ):
        one(tokens(1, 3))


def test_a_layer_without_its_source_is_an_error() -> None:
    one = model(SHARED)
    attention = one.model.layers[1].self_attn
    assert not hasattr(attention, "k_proj")
    contexts = one.model._contexts(torch.zeros(1, 2, 32), None, Layout(), None)
    with pytest.raises(
        ValueError, match="layer 1 reads the keys and values of layer 0, which were not given to it"
    ):
        attention(torch.zeros(1, 2, 32), None, Tokens(contexts, Layout(), None))


def test_a_forward_that_fails_leaves_the_cache_alone() -> None:
    one, ids = model(CYCLIC, MERGING), tokens(1, 8)
    cache = one(ids[:, :5]).past_key_values
    hook = one.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one(ids[:, 5:], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 5
    close(one(ids[:, 5:], past_key_values=cache).logits, one(ids, use_cache=False).logits[:, 5:], 1e-4)


def test_parameters_of_layers_that_only_read() -> None:
    one: LCKVLlamaForCausalLM = model(CYCLIC)
    with_keys = [index for index, layer in enumerate(one.model.layers) if hasattr(layer.self_attn, "k_proj")]
    assert with_keys == [0, 3]
    biased = model(CYCLIC, qkv_bias=True, qk_norm=True)
    names = {name for name in biased.state_dict() if name.startswith("model.layers.1.self_attn")}
    kinds = ("q_proj.weight", "q_proj.bias", "o_proj.weight", "q_norm.weight")
    assert names == {f"model.layers.1.self_attn.{kind}" for kind in kinds}


@pytest.mark.parametrize(("layer_types", "policy"), [(CYCLIC, None), (CYCLIC, MERGING)])
def test_mixed_precision(layer_types: str, policy: DMCConfig | None) -> None:
    one, ids = model(layer_types, policy, initializer_range=0.1), tokens(2, 8)
    exact = one(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = one.train()(ids, labels=ids).loss
        loss.backward()
        one.eval()
        with torch.no_grad():
            cache = one(ids[:, :5]).past_key_values
            rest = one(ids[:, 5:7], past_key_values=cache).logits
            one(ids[:, 7:], past_key_values=cache)
    assert rest.isfinite().all()
    if policy is None:
        close(loss, exact, 0.1)
    assert all(parameter.grad.isfinite().all() for parameter in one.parameters())

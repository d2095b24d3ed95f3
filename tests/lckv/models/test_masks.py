"""Masks with holes, and masks that hide what a cache holds, on dense models: as in transformers' own Llama,
and on shared maps as if the hidden tokens were not there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.models.cache import CACHE_NAME
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import (
    CYCLIC,
    CYCLIC_WINDOWS,
    MAPS,
    MERGING,
    PLAIN,
    SHARED,
    WINDOWS,
    close,
    model,
    tokens,
)

IDS = tokens(3, 10)
MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1, 1, 1], [1] * 10])
KEPT = [row.bool() for row in MASK]


def llama(one: LCKVLlamaForCausalLM) -> LlamaForCausalLM:
    """With the same weights."""
    fields = one.config.to_dict()
    for name in ("compression", "qkv_bias", "qk_norm", "model_type", "architectures", "transformers_version"):
        fields.pop(name)
    other = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    other.load_state_dict(one.state_dict())
    return other


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", [None, (MASK.cumsum(1) - 1).clamp(min=0)])
def test_plain_models_are_llama(implementation: str, positions: Tensor | None) -> None:
    one = model(PLAIN)
    other = llama(one)
    one.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = other(IDS, attention_mask=MASK, position_ids=positions).logits
        for cuts in ((10,), (4, 1, 3, 1, 1)):
            for use_cache in (True, False) if len(cuts) == 1 else (True,):
                cache, start, parts = None, 0, []
                for width in cuts:
                    part = slice(start, start + width)
                    options: dict[str, Any] = (
                        {} if positions is None else {"position_ids": positions[:, part]}
                    )
                    output = one(
                        IDS[:, part],
                        attention_mask=MASK[:, : start + width],
                        past_key_values=cache,
                        use_cache=use_cache,
                        **options,
                    )
                    cache, start = output.past_key_values, start + width
                    parts.append(output.logits)
                found = torch.cat(parts, 1)
                for row, kept in enumerate(KEPT):
                    close(found[row, kept], expected[row, kept], 1e-4)


@pytest.mark.parametrize("layer_types", [layer_types for layer_types in MAPS if "s" not in str(layer_types)])
def test_hidden_tokens_are_as_if_not_there(layer_types: str | None) -> None:
    """Of every map, uncached, cached in one piece and in several, and hidden when they were seen before."""
    one = model(layer_types)
    positions = torch.arange(10)[None]
    with torch.no_grad():
        alone = [
            one(IDS[row : row + 1, kept], position_ids=positions[:, kept] + 1, use_cache=False).logits[0]
            for row, kept in enumerate(KEPT)
        ]
        for use_cache in (False, True):
            found = one(IDS, attention_mask=MASK, use_cache=use_cache).logits
            for row, kept in enumerate(KEPT):
                close(found[row, kept], alone[row], 1e-4)
        # What comes after is what it would be had the cache never held them.
        for first in (None, MASK[:, :8]):
            cache = one(IDS[:, :8], attention_mask=first).past_key_values
            shown = one(IDS[:, 8:9], attention_mask=MASK[:, :9], past_key_values=cache).logits
            expected = hidden_behind(one, first)
            close(shown[:, 0], expected, 1e-4)
    assert cache.get_seq_length() == 9


def hidden_behind(one: LCKVLlamaForCausalLM, first: Tensor | None) -> Tensor:
    """Logits of token 8 that sees those of MASK among eight tokens, which saw each other as `first` says: the
    plain computation on one row, from the cache's own keys and values."""
    logits = []
    for row, kept in enumerate(KEPT):
        mask = None if first is None else first[row : row + 1]
        cache = one(IDS[row : row + 1, :8], attention_mask=mask).past_key_values
        stored = torch.ones(8, dtype=torch.bool) if mask is None else mask[0].bool()
        staying = kept[:8][stored]
        for layer in cache.slots._layers.values():
            key, value, lengths = layer._slots
            count = int(staying.sum())
            places = torch.cat((staying.nonzero()[:, 0], torch.zeros(1, dtype=torch.int64)))
            layer._slots = type(layer._slots)(key[:, :, places], value[:, :, places], lengths * 0 + count)
            layer._longest = count
        position = torch.tensor([[8 - int((MASK[row].cumsum(0) == 0).sum()) * (first is not None)]])
        logits.append(one(IDS[row : row + 1, 8:9], position_ids=position, past_key_values=cache).logits[0, 0])
    return torch.stack(logits)


@pytest.mark.parametrize("layer_types", [WINDOWS, CYCLIC_WINDOWS])
def test_windows_count_columns(layer_types: str) -> None:
    """With a cache and without, in one call and in several, whenever a column is hidden."""
    one, ids = model(layer_types), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, [1, 5, 6]] = mask[1, :3] = 0
    with torch.no_grad():
        expected = one(ids, attention_mask=mask, use_cache=False).logits
        cache, parts = None, []
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
            output = one(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
        for row in range(2):
            close(torch.cat(parts, 1)[row, mask[row].bool()], expected[row, mask[row].bool()], 1e-4)
        if layer_types == WINDOWS:  # a window of 3: what it does not reach changes nothing
            other = ids.clone()
            other[:, :2] += 1
            moved = one.model(other.clamp(max=60), attention_mask=mask, output_hidden_states=True)
            still = one.model(ids, attention_mask=mask, output_hidden_states=True)
            close(moved.hidden_states[1][0, 4:], still.hidden_states[1][0, 4:])


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC])
def test_turns_of_a_batched_chat(layer_types: str | None) -> None:
    """A row that ended early was filled up while the others went on; the next turn hides that."""
    one, ids = model(layer_types), tokens(2, 12)
    first = torch.ones(2, 8, dtype=torch.int64)
    second = torch.ones(2, 12, dtype=torch.int64)
    second[0, 5:8] = 0
    positions = (second.cumsum(1) - 1)[:, 8:]
    with torch.no_grad():
        cache = one(ids[:, :8], attention_mask=first).past_key_values
        found = one(ids[:, 8:], attention_mask=second, position_ids=positions, past_key_values=cache).logits
        kept = second[0].bool()
        close(found[0], one(ids[:1, kept], use_cache=False).logits[0, 5:], 1e-4)
        close(found[1], one(ids[1:], use_cache=False).logits[0, 8:], 1e-4)


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC])
@pytest.mark.parametrize("use_cache", [False, True])
def test_generation_behind_padding_anywhere(layer_types: str | None, use_cache: bool) -> None:
    one = model(layer_types)
    ids, mask = IDS[:, :6].clone(), torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = mask[1, 2] = mask[2, :2] = 0
    ids[mask == 0] = one.config.pad_token_id
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
    found = one.generate(ids, attention_mask=mask, **options)
    assert torch.equal(one.generate(ids, **options), found)  # transformers infers the mask
    if layer_types == PLAIN:
        assert torch.equal(llama(one).generate(ids, attention_mask=mask, **options), found)
    for row in range(3):
        alone = one.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(alone[0], found[row])


@pytest.mark.parametrize("layer_types", [PLAIN, CYCLIC_WINDOWS])
def test_prompt_lookup_behind_padding(layer_types: str | None) -> None:
    one, ids = model(layer_types), tokens(1, 4).repeat(1, 3)
    ids[:, 5] = one.config.pad_token_id
    expected = one.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(
        one.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), expected
    )


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC, WINDOWS])
def test_training_behind_padding_anywhere(layer_types: str | None) -> None:
    """Losses and gradients are those without the hidden tokens, dropout included in what can be done."""
    one = model(layer_types)
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[:, 1:][MASK[:, :-1] == 0] = -100
    one.train()(IDS, attention_mask=MASK, labels=labels).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in one.named_parameters()}
    other = IDS.masked_fill(MASK == 0, 17)
    one.zero_grad()
    one(other, attention_mask=MASK, labels=labels).loss.backward()
    for name, parameter in one.named_parameters():
        close(parameter.grad, gradients[name], 1e-5)
    one.config.attention_dropout = 0.5
    assert (
        one(IDS, attention_mask=MASK).logits - one.eval()(IDS, attention_mask=MASK).logits
    ).abs().max() > 0.1


@pytest.mark.parametrize("layer_types", [PLAIN, CYCLIC])
def test_packed_rows_with_holes(layer_types: str | None) -> None:
    one, ids = model(layer_types), tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1]])
    with torch.no_grad():
        found = one(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 4), slice(4, 9)):
            alone = one(ids[:, part], attention_mask=mask[:, part], use_cache=False).logits
            close(found[:, part][mask[:, part].bool()], alone[mask[:, part].bool()])


def test_rows_and_columns_are_followed() -> None:
    one = model(SHARED)
    with torch.no_grad():
        cache = one(IDS[:, :6], attention_mask=MASK[:, :6]).past_key_values
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        cache.crop(-2)
        mask = MASK[[1, 0, 2]]
        assert torch.equal(cache.slots.counted, mask[:, :4].bool())
        assert cache.slots.seen.tolist() == [2, 3, 4]
        found = one(IDS[[1, 0, 2], 4:], attention_mask=mask, past_key_values=cache).logits
        expected = one(IDS[[1, 0, 2]], attention_mask=mask, use_cache=False).logits[:, 4:]
        close(found[mask[:, 4:].bool()], expected[mask[:, 4:].bool()], 1e-4)
        cache.crop(-10)
        assert cache.get_seq_length() == 0
        close(one(IDS, attention_mask=MASK, past_key_values=cache).logits[2], one(IDS[2:]).logits[0], 1e-4)


@pytest.mark.parametrize("layer_types", [PLAIN, CYCLIC])
def test_merging_models_say_what_is_wrong(layer_types: str | None) -> None:
    one: LCKVLlamaForCausalLM = model(layer_types, MERGING)
    with pytest.raises(
        ValueError, match="attention_mask: row 0 has padding between its tokens; the KV policy d"
    ):
        one(IDS, attention_mask=MASK)
    cache = one(IDS[:, :4]).past_key_values
    with pytest.raises(
        ValueError, match=rf"attention_mask hides column 2 of row 0, .* start again without {CACHE_NAME}"
    ):
        one(IDS[:, 4:5], attention_mask=MASK[:, :5], past_key_values=cache)
    assert cache.get_seq_length() == 4
    ids = IDS.clone()
    ids[0, 3] = one.config.pad_token_id
    with pytest.raises(ValueError, match="attention_mask: row 0 has padding between its tokens"):
        one.generate(ids, max_new_tokens=2)
    zeroing = model(layer_types, DMCConfig(stage="zero_out"))
    assert zeroing(IDS, attention_mask=MASK).logits.isfinite().all()

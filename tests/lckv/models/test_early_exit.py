"""Prompts of which not all logits are wanted: the same logits and caches as with all layers for all tokens,
for every kind of map, and layers above all keys and values run for what is wanted alone."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lckv.cache.contiguous import ContiguousCache
from lckv.models.cache import LCKVCache
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from lckv.sharing.plan import iteration_plan
from tests.lckv.cache import models
from tests.lckv.cache.models import CASES, MIXED_CASES, contiguous_cache, paged_cache, text
from tests.lckv.models.tiny import CYCLIC, MAPS, MERGING, PLAIN, SHARED, TWO_GROUPS, close, tokens
from tests.lckv.models.tiny import model as tiny
from tests.lckv.sharing.maps import sources

ENDS = {"no padding": (0, 0, 0), "left": (0, 4, 9), "right": (0, -4, -9)}
"""Columns of padding of each row; negative at the end."""


@contextmanager
def fed(built: LCKVLlamaForCausalLM) -> Iterator[list[tuple[int, int]]]:
    """Layers, and the tokens of a row that their MLPs see, call by call."""
    calls: list[tuple[int, int]] = []

    def note(index: int) -> Any:
        return lambda _module, given: calls.append((index, given[0].shape[1] if given[0].dim() == 3 else 1))

    handles = [
        layer.mlp.register_forward_pre_hook(note(index)) for index, layer in enumerate(built.model.layers)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def same_caches(one: ContiguousCache, other: ContiguousCache) -> None:
    """In what attention can see."""
    assert torch.equal(one.seen, other.seen) and one.columns == other.columns
    for mine, its in zip(one._layers.values(), other._layers.values(), strict=True):
        assert torch.equal(mine.past.lengths, its.past.lengths)
        used = torch.arange(mine.past.key.shape[2]) < mine.past.lengths[..., None]
        for before, after in ((mine.past.key, its.past.key), (mine.past.value, its.past.value)):
            close(before[used], after[used], 1e-5)
        if its.state is not None:
            close(mine.state, its.state, 1e-4)


def mask_of(ends: tuple[int, ...], width: int) -> Tensor:
    place = torch.arange(width)
    return torch.stack([place >= end if end >= 0 else place < width + end for end in ends])


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("name", "policy"), [*CASES, *MIXED_CASES])
@torch.inference_mode()
def test_the_newest_columns(name: str, policy: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `generate` asks for them: a prompt, and one that follows it in two pieces, then a token."""
    built = models.model(name, policy)
    monkeypatch.setattr(built.model, "steps", iteration_plan(built.model.layer_types, 1, 1))
    ids = torch.tensor([text(31, seed) for seed in range(3)])
    mask = mask_of(ENDS[ends], 20)
    mask = torch.cat((mask, torch.ones(3, 11, dtype=torch.bool)), 1)
    caches = LCKVCache(built.config), LCKVCache(built.config)
    start = 0
    for width in (20, 7, 3, 1):
        part, shown = ids[:, start : start + width], mask[:, : start + width].long()
        whole, narrow = (
            built(part, attention_mask=shown, past_key_values=cache, logits_to_keep=kept).logits
            for cache, kept in zip(caches, (0, 2), strict=True)
        )
        assert narrow.shape[1] == min(width, 2)
        close(narrow, whole[:, -2:], 5e-5)
        same_caches(caches[1].slots, caches[0].slots)
        start += width
    if ends == "no padding":  # without a cache, and longer
        for kept in (1, 19, 20, 25):
            close(
                built(ids[:, :20], use_cache=False, logits_to_keep=kept).logits,
                built(ids[:, :20]).logits[:, -kept:],
            )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "policy"), [*CASES, *MIXED_CASES])
@torch.inference_mode()
def test_any_columns_of_rows_and_none(name: str, policy: str, padded: bool) -> None:
    """As the engine asks for them: rows of different lengths, in contiguous and paged caches, prompts in
    chunks."""
    built, rows = models.model(name, policy), [text(24, seed) for seed in range(3)]
    lengths = torch.tensor([12, 5, 9] if padded else [12] * 3)
    counted = torch.arange(12) < lengths[:, None] if padded else None
    embedded = built.model.embed_tokens(torch.tensor(rows))
    newest = lengths[:, None] - 1

    def run(cache: Any, kept: Tensor | None, chunk: slice = slice(12)) -> Tensor:
        output = built.model.run(
            embedded[:, chunk], cache, counted=counted, iteration=Iteration(3), wanted=kept
        )
        return output.last_hidden_state

    for make in (
        lambda: contiguous_cache(built),
        lambda: (paged := paged_cache(built)).rows([paged.open() for _ in rows]),
    ):
        whole, narrow, nothing = make(), make(), make()
        for chunk in (slice(12), slice(12, 24)):
            expected = run(whole, None, chunk)
            close(run(narrow, newest, chunk), expected[torch.arange(3)[:, None], newest], 5e-5)
            assert run(nothing, newest[:, :0], chunk).shape == (3, 0, 32)
        after = built.model.embed_tokens(torch.tensor([[1], [2], [3]]))
        one, *others = (built.model.run(after, cache).last_hidden_state for cache in (whole, narrow, nothing))
        for other in others:
            close(other, one, 5e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5).flatmap(sources), st.sampled_from([None, MERGING]), st.integers(0, 6), st.integers(1, 3)
)
def test_any_map(read: list[int], policy: Any, padding: int, kept: int) -> None:
    built = tiny("_".join(map(str, read)), policy, forward_passes=1, backward_passes=1)
    ids, mask = tokens(2, 9), mask_of((0, padding), 9).long()
    caches = LCKVCache(built.config), LCKVCache(built.config)
    with torch.inference_mode():
        whole, narrow = (
            built(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=number).logits
            for cache, number in zip(caches, (0, kept), strict=True)
        )
    close(narrow, whole[:, -kept:])
    same_caches(caches[1].slots, caches[0].slots)


@pytest.mark.parametrize("name", models.MAPS)
@torch.inference_mode()
def test_layers_above_run_for_what_is_wanted_alone(name: str) -> None:
    built = models.model(name)
    ids, layer_types = torch.tensor([text(12)]), built.model.layer_types
    with fed(built) as every:
        built(ids)
    with fed(built) as some:
        built(ids, logits_to_keep=1)
    with fed(built) as none:
        built.model.run(
            built.model.embed_tokens(ids),
            contiguous_cache(built),
            wanted=torch.empty(1, 0, dtype=torch.int64),
        )
    top = max(layer_types.kv_layers)
    below = len(every) - (len(layer_types) - top)
    assert some == every[:below] + [(index, 1) for index, _ in every[below:]]
    assert none == every[:below]
    assert [index for index, _ in every[below:]] == list(range(top, len(layer_types)))


@pytest.mark.parametrize("policy", ["dense", "dmc"])
@torch.inference_mode()
def test_a_prompt_behind_a_prefix_iterates_its_new_tokens_alone(policy: str) -> None:
    """No pass looks at the prefix again, and the plan is as long as without one."""
    built, ids = models.model("LCKV", policy), torch.tensor([text(30)])
    cache = LCKVCache(built.config)
    with fed(built) as alone:
        built(ids[:, :7], logits_to_keep=1)
    built(ids[:, :23], past_key_values=cache)
    with fed(built) as behind:
        found = built(ids[:, 23:], past_key_values=cache, logits_to_keep=1).logits
    assert behind == alone and max(tokens for _, tokens in behind) == 7
    counts = Counter(index for index, _ in behind)
    assert counts == {0: 1, **dict.fromkeys(range(1, 4), 9), 4: 1, 5: 1}
    expected = models.parallel_logits(built, text(30))[-1]
    close(found[0, -1], expected, 2e-3)


@pytest.mark.parametrize("name", ["plain", "YOCO", "LCKV"])
@torch.inference_mode()
def test_what_needs_all_tokens_gets_them(name: str) -> None:
    built, ids = models.model(name), torch.tensor([text(9)])
    whole = built(ids, output_hidden_states=True)
    for options in ({"output_hidden_states": True}, {"output_hidden_states": [2]}):
        output = built(ids, logits_to_keep=1, **options)
        close(output.logits, whole.logits[:, -1:])
        close(output.hidden_states[2], whole.hidden_states[2])
    for kept in (torch.tensor([3, -1]), torch.tensor([[0, 8]])):
        places = kept.flatten()
        close(built(ids, logits_to_keep=kept).logits, whole.logits[:, places])
    close(built.model(ids, states_to_keep=2).last_hidden_state, whole.hidden_states[-1][:, -2:])
    with pytest.raises(
        ValueError, match=r"wanted is a tensor \[1, 1\], .* need all tokens: leave one of them out"
    ):
        built.model.run(
            built.model.embed_tokens(ids), wanted=torch.zeros(1, 1).long(), output_hidden_states=True
        )


@pytest.mark.parametrize("layer_types", MAPS)
@torch.inference_mode()
def test_holes_hidden_columns_and_packed_sequences(layer_types: str | None) -> None:
    built, ids = tiny(layer_types, forward_passes=1, backward_passes=1), tokens(3, 10)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 10])
    later = mask.clone()
    later[2, 1:3] = 0  # which the cache then holds
    whole, narrow = [], []
    for parts, kept in ((whole, 0), (narrow, 3)):
        cache = LCKVCache(built.config)
        for start, stop, shown in ((0, 6, mask), (6, 10, later)):
            options = {"attention_mask": shown[:, :stop], "past_key_values": cache, "logits_to_keep": kept}
            parts.append(built(ids[:, start:stop], **options).logits)
        parts.append(
            built(
                ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]), logits_to_keep=kept
            ).logits
        )
    for one, other in zip(whole, narrow, strict=True):
        close(other, one[:, -3:])


@pytest.mark.parametrize("policy", [None, MERGING])
@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC, TWO_GROUPS])
def test_training_and_statistics_see_all_tokens(layer_types: str | None, policy: Any) -> None:
    built, ids = tiny(layer_types, policy), tokens(2, 9)
    whole, narrow = (built(ids, use_cache=False, logits_to_keep=kept) for kept in (0, 1))
    assert (whole.statistics is None) == (narrow.statistics is None) == (policy is None)
    for name, values in (whole.statistics or {}).items():
        close(narrow.statistics[name], values)
    built.train()
    with fed(built) as calls:
        built(ids, labels=ids[:, -4:], logits_to_keep=4).loss.backward()
    assert {count for _, count in calls} == {9}
    assert all(parameter.grad is not None for parameter in built.parameters())


@torch.inference_mode()
def test_generate_exits_early() -> None:
    built = models.model("YOCO")
    ids, mask = torch.tensor([text(12), text(12, 1)]), mask_of((0, 3), 12).long()
    with fed(built) as calls:
        answer = built.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert calls[:6] == [(0, 12), (1, 12), (2, 12), (3, 1), (4, 1), (5, 1)]
    logits = built(answer[:, :-1], attention_mask=torch.cat((mask, torch.ones(2, 2).long()), 1)).logits
    assert torch.equal(answer[:, 12:], logits[:, 11:].argmax(-1))

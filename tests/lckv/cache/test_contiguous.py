"""The cache of one layer, whatever pieces tokens come in, against attention over each row as a whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.attention.visibility import Visibility
from lckv.cache import layer_slots
from lckv.cache.contiguous import ContiguousCache
from lckv.policies.base import Extension, KVPolicy, TokenContext
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from lckv.rope import rotate
from tests.lckv.policies.dmc.models import angles, attend, context, layer

POLICIES: list[tuple[KVPolicy, int | None]] = [
    (DenseConfig().build(), None),
    *((DenseConfig().build(), window) for window in (1, 2, 5)),
    *((DMCPolicy(DMCConfig(stage="finetune", window=window)), None) for window in (None, 1, 2, 12)),
]
"""With the sliding window of the layer."""


def extend(policy: KVPolicy, cache: ContiguousCache, tensors: list[Tensor], facts: TokenContext) -> Extension:
    query, key, value = tensors
    state = None if cache.empty else cache.state(0)
    return policy.extend(state, key, value, query if policy.traits.reads_query else None, facts)


def facts_at(positions: Tensor, counted: Tensor) -> TokenContext:
    """Of tokens at positions [s, b], of which those in `counted` [s, b] are no padding."""
    return TokenContext(
        lambda heads, last=None: rotate(heads, angles(positions, heads.shape[-1]), last=last), counted=counted
    )


@given(
    policy=st.sampled_from(POLICIES),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    exclude_self=st.booleans(),
    calls=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    ),
)
def test_any_pieces_equal_the_whole(policy, kv_heads, group, exclude_self, calls):
    """`calls` holds, for each call and row, how many tokens come and how much padding is before them."""
    policy, window = policy
    visibility = Visibility(exclude_self, window)
    length = sum(max(count for count, _ in call) for call in calls) + 1
    whole = [tensor.detach() for tensor in layer(length, 3, kv_heads, group)]
    cache, used, found = (
        ContiguousCache([0], policy, {} if window is None else {0: window}),
        [0] * 3,
        [[], [], []],
    )
    for call in calls:
        width = max(1, *(count + before for count, before in call))
        # padding has keys that would show
        part = [torch.full((width, *tensor.shape[1:]), 9.0) for tensor in whole]
        counted, positions = torch.zeros(width, 3, dtype=torch.bool), torch.zeros(width, 3, dtype=torch.int64)
        for row, (count, before) in enumerate(call):
            inside, tokens = slice(before, before + count), slice(used[row], used[row] + count)
            for new, old in zip(part, whole, strict=True):
                new[inside, row] = old[tokens, row]
            counted[inside, row], positions[inside, row] = True, torch.arange(tokens.start, tokens.stop)
            used[row] += count
        facts = facts_at(positions, counted)
        extension = extend(policy, cache, part, facts)
        query = policy.query(part[0], facts).permute(1, 2, 0, 3)
        if cache.empty:
            cache.commit({0: extension}, counted.T)
            _drop_all(cache)  # so that the first tokens, too, are read through the cache
        outputs = cache.attend(
            0,
            query,
            extension,
            counted.T,
            visibility,
            scale=query.shape[-1] ** -0.5,
            key_bias=policy.traits.key_bias,
        )
        cache.commit({0: extension}, counted.T)
        for row, (count, before) in enumerate(call):
            found[row].append(outputs[row, :, before : before + count].transpose(0, 1))
    assert cache.seen.tolist() == used
    for row in range(3):
        tensors = [tensor[: used[row], row : row + 1] for tensor in whole]
        if used[row]:
            facts = context(used[row], 1)
            key_value, _ = policy.keys_values(
                tensors[1], tensors[2], tensors[0] if policy.traits.reads_query else None, facts
            )
            output = attend(
                policy.query(tensors[0], facts), key_value, visibility, key_bias=policy.traits.key_bias
            )
            torch.testing.assert_close(torch.cat(found[row]), output[:, 0], rtol=0, atol=2e-5)


def _drop_all(cache: ContiguousCache) -> None:
    cache._seen = torch.zeros_like(cache.seen)
    slots = cache._layers[0]
    slots._slots = slots._slots._replace(lengths=torch.zeros_like(slots._slots.lengths))
    slots.state = None if slots.state is None else torch.zeros_like(slots.state)


def dense(tokens: int, rows: int = 2, heads: int = 2, channels: int = 4, seed: int = 0) -> Extension:
    generator = torch.Generator().manual_seed(seed)
    return Extension(*torch.randn(2, tokens, rows, heads, channels, generator=generator))


def test_every_layer_is_committed_or_none() -> None:
    cache = ContiguousCache([0, 3], DenseConfig().build(), {})
    for wrong in ({0: dense(2)}, {0: dense(2), 3: dense(2), 4: dense(2)}):
        with pytest.raises(ValueError, match=r"the cache holds layers \[0, 3\]; keys and values of \[0"):
            cache.commit(wrong, None)
    assert cache.empty
    assert cache.num_bytes == 0


def test_memory_grows_with_the_slots_and_not_with_the_tokens() -> None:
    policy = DMCPolicy(DMCConfig(stage="finetune", window=2))
    sizes = {}
    for name, logit in (("all in one", 6.0), ("none", 4.0)):
        query, key, value = (tensor.detach() for tensor in layer(200))
        key[..., -1] = logit
        cache = ContiguousCache([0], policy, {})
        for token in range(200):
            now = slice(token, token + 1)
            part = [tensor[now] for tensor in (query, key, value)]
            cache.commit({0: extend(policy, cache, part, context(1, 2, start=token))}, None)
        sizes[name] = cache.lengths(0).unique().tolist(), cache.num_bytes
    assert sizes["all in one"][0] == [1]
    assert sizes["none"][0] == [200]
    fixed = 2 * 2 * 8 + 2 * 2 * 17 * 4  # lengths and state
    per_slot = 2 * 2 * 2 * 8 * 4
    assert sizes["all in one"][1] <= fixed + 4 * per_slot
    assert fixed + 200 * per_slot < sizes["none"][1] <= fixed + 2 * 200 * per_slot


def test_lengths_are_asked_for_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time waits for the device."""
    asked: list[int] = []
    to_int = Tensor.__int__
    monkeypatch.setattr(Tensor, "__int__", lambda tensor: asked.append(1) or to_int(tensor))
    for forbidden in ("nonzero", "item", "tolist", "__bool__"):
        monkeypatch.setattr(Tensor, forbidden, lambda *_: pytest.fail("waits for the device"))
    cache = ContiguousCache([0, 1], DenseConfig().build(), {1: 8})
    for token in range(500):
        cache.commit({0: dense(1, seed=token), 1: dense(1, seed=token)}, torch.ones(2, 1, dtype=torch.bool))
    assert len(asked) < 2 * 500 // 25


def test_windows_keep_what_they_may_give_back() -> None:
    cache = ContiguousCache([0], DenseConfig().build(), {0: 8})
    everything = [dense(1, seed=token) for token in range(300)]
    for extension in everything:
        cache.commit({0: extension}, None)
    past = cache._layers[0].past
    kept = int(past.lengths.max())
    assert 7 + 32 <= kept <= 7 + 64 + 2
    newest = torch.cat([extension.key for extension in everything[-kept:]]).permute(1, 2, 0, 3)
    assert torch.equal(past.key[:, :, :kept], newest)
    assert cache.seen.tolist() == [300, 300]


def test_tokens_of_a_window_are_moved_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    without_oldest = layer_slots._without_oldest
    monkeypatch.setattr(
        layer_slots, "_without_oldest", lambda *args: moved.append(1) or without_oldest(*args)
    )
    for window, prompt in ((8, 100), (8, 1), (200, 300), (200, 231)):
        cache = ContiguousCache([0], DenseConfig().build(), {0: window})
        cache.commit({0: dense(prompt)}, None)
        moved.clear()
        for token in range(400):
            cache.commit({0: dense(1, seed=token)}, None)
        assert len(moved) <= 400 // (32 + window // 4) + 8  # the second term is growth
        assert cache.num_bytes <= 2 * 2 * 2 * (window + 64 + window // 4) * 4 * 4 + 2 * 2 * 2 * 8


@given(
    window=st.sampled_from([None, 1, 3, 40]),
    exclude_self=st.booleans(),
    calls=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    then=st.sampled_from(["padding", "rows", "forgotten"]),
)
def test_rows_without_padding_are_as_rows_of_which_all_tokens_count(window, exclude_self, calls, then):
    visibility, windows = Visibility(exclude_self, window), {} if window is None else {0: window}
    caches = [ContiguousCache([0], DenseConfig().build(), windows) for _ in range(2)]

    def call(tokens: int, counted: list[Tensor | None], seed: int) -> None:
        new = dense(tokens, seed=seed)
        query = torch.randn(2, 4, tokens, 4, generator=torch.Generator().manual_seed(seed))
        if not caches[0].empty:
            output, expected = (
                cache.attend(0, query, new, real, visibility, scale=0.5, key_bias=None)
                for cache, real in zip(caches, counted, strict=True)
            )
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        for cache, real in zip(caches, counted, strict=True):
            cache.commit({0: new}, real)

    for seed, tokens in enumerate(calls):
        call(tokens, [None, torch.ones(2, tokens, dtype=torch.bool)], seed)
    assert caches[0]._layers[0].past.even
    assert not caches[1]._layers[0].past.even
    if then == "padding":
        call(3, [torch.tensor([[True] * 3, [False, True, True]])] * 2, 7)
    for cache in caches:
        if then == "rows":
            cache.select_rows(torch.tensor([1, 1]))
        if then == "forgotten":
            cache.drop_newest(1)
    assert caches[0]._layers[0].past.even == (then == "rows")
    call(1, [None, None], 8)
    call(2, [None, None], 9)
    call(1, [None, None], 10)


def test_gradients_end_here() -> None:
    extension = Extension(*(tensor.requires_grad_() for tensor in dense(3)[:2]))
    cache = ContiguousCache([0], DenseConfig().build(), {})
    cache.commit({0: extension}, None)
    assert not cache._layers[0].past.key.requires_grad


def test_state_is_that_of_the_policy() -> None:
    policy = DMCPolicy(DMCConfig(stage="finetune", window=4))
    cache = ContiguousCache([0], policy, {})
    assert cache.state(0) is None
    tensors = [tensor.detach() for tensor in layer(6)]
    extension = extend(policy, cache, tensors, context(6, 2))
    cache.commit({0: extension}, None)
    assert torch.equal(cache.state(0), extension.state)
    cache.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.state(0), extension.state[:, [1, 1, 0]])
    assert cache.lengths(0).shape == (3, 2)

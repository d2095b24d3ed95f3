"""Extending a cache piece by piece against the evaluation of the whole."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.cache.contiguous import ContiguousCache
from lckv.policies.base import TokenContext
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from lckv.rope import rotate
from tests.lckv.policies.dmc.models import angles, context, documents_of, layer

WINDOWS = (None, 1, 2, 12)
OPTIONS = [DMCPolicy(DMCConfig(stage="finetune", window=window)) for window in WINDOWS]


def slots(policy: DMCPolicy, tensors: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values of the whole slots of each row and head, from the parallel evaluation."""
    query, key, value = tensors
    tokens, rows, heads, _ = key.shape
    found, _ = policy.keys_values(key, value, query, context(tokens, rows))
    whole = found.key[..., -1] > -1
    return [
        [
            (found.key[whole[:, row, head], row, head, :-1], found.value[whole[:, row, head], row, head])
            for head in range(heads)
        ]
        for row in range(rows)
    ]


def extended(policy: DMCPolicy, tensors: list[Tensor], sizes: list[int]) -> ContiguousCache:
    query, key, value = tensors
    cache, start = ContiguousCache([0], policy, {}), 0
    for size in sizes:
        part = slice(start, start + size)
        facts = context(size, key.shape[1], start=start)
        state = None if cache.empty else cache.state(0)
        cache.commit({0: policy.extend(state, key[part], value[part], query[part], facts)}, None)
        start += size
    return cache


@given(
    policy=st.sampled_from(OPTIONS),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    spread=st.sampled_from([0.5, 3.0]),
)
def test_slots_and_state_do_not_depend_on_the_pieces(policy, kv_heads, group, sizes, spread):
    tensors = [tensor.detach() for tensor in layer(sum(sizes), 2, kv_heads, group, spread=spread)]
    expected = slots(policy, tensors)
    one_by_one = extended(policy, tensors, [1] * sum(sizes))
    for cache in (one_by_one, extended(policy, tensors, sizes)):
        past = cache._layers[0].past
        for row in range(2):
            for head in range(kv_heads):
                keys, values = expected[row][head]
                assert past.lengths[row, head] == len(keys)
                torch.testing.assert_close(past.key[row, head, : len(keys), :-1], keys, rtol=0, atol=2e-5)
                torch.testing.assert_close(past.value[row, head, : len(keys)], values, rtol=0, atol=2e-5)
        # what the state says of tokens that weigh nothing does not matter
        state, same = (each.state(0) for each in (cache, one_by_one))
        torch.testing.assert_close(
            state * (state[..., -1:] > 0), same * (same[..., -1:] > 0), rtol=0, atol=1e-5
        )
        assert state.dtype == torch.float32


@pytest.mark.parametrize("policy", OPTIONS, ids=WINDOWS)
def test_padding_on_either_side_leaves_no_trace(policy: DMCPolicy) -> None:
    query, key, value = (tensor.detach() for tensor in layer(20))
    state = policy.extend(None, key[:9], value[:9], query[:9], context(9, 2)).state
    new = [tensor[9:14] for tensor in (key, value, query)]
    alone = policy.extend(state, *new, context(5, 2, start=9))
    for before, after in ((3, 0), (0, 2), (2, 4)):
        width = before + 5 + after
        positions = (torch.arange(width) - before).clamp(0, 4)
        padded = [torch.cat((tensor[:before] + 50, tensor, tensor[:after] - 50)) for tensor in new]
        counted = ((torch.arange(width) >= before) & (torch.arange(width) < before + 5))[:, None].expand(
            -1, 2
        )
        turned = angles((positions + 9)[:, None].expand(-1, 2), 8)
        found = policy.extend(state, *padded, TokenContext(partial(rotate, angles=turned), counted=counted))
        inside = slice(before, before + 5)
        torch.testing.assert_close(found.key[inside], alone.key, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.value[inside], alone.value, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.state, alone.state, rtol=0, atol=1e-5)
        assert torch.equal(found.hides, alone.hides)
        assert torch.equal(found.key[inside][..., -1], alone.key[..., -1])


@pytest.mark.parametrize("policy", OPTIONS, ids=WINDOWS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_row_of_padding_stays_as_it_is(policy: DMCPolicy, tokens: int) -> None:
    query, key, value = (tensor.detach() for tensor in layer(20))
    counted = torch.tensor([[True, False]]).expand(tokens, 2)
    for state in (None, policy.extend(None, key[:9], value[:9], query[:9], context(9, 2)).state):
        new = slice(9, 9 + tokens)
        found = policy.extend(
            state, key[new], value[new], query[new], context(tokens, 2, start=9, counted=counted)
        )
        before = torch.zeros_like(found.state) if state is None else state
        assert torch.equal(found.state[:, 1, :, -1], before[:, 1, :, -1])
        torch.testing.assert_close(found.state[:, 1], before[:, 1], rtol=0, atol=1e-6)
        assert not found.hides[:, 1].any()
        assert found.key.isfinite().all()


@pytest.mark.parametrize("policy", OPTIONS, ids=WINDOWS)
def test_documents_begin_slots(policy: DMCPolicy) -> None:
    query, key, value = (tensor.detach() for tensor in layer(20))
    facts = context(20, 2, documents=documents_of([[7, 13], [1, 19]]))
    expected, _ = policy.keys_values(key, value, query, facts)
    found = policy.extend(None, key, value, query, facts)
    torch.testing.assert_close(found.key, expected.key, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-5)


def test_the_mean_is_kept_in_float32() -> None:
    policy = DMCPolicy(DMCConfig(stage="finetune", window=None, eps=0.01))
    query, key, value = (tensor.detach().bfloat16() for tensor in layer(40))
    key[..., -1] = 6.0
    weight = policy.importance(query, 2)[..., None]
    expected = (value.float() * weight).sum(0) / weight.sum(0)
    for sizes in ([1] * 40, [7, 1, 32]):
        cache = extended(policy, [query, key, value], sizes)
        past = cache._layers[0].past
        assert past.lengths.unique().tolist() == [1]
        assert past.value.dtype == torch.bfloat16
        torch.testing.assert_close(past.value[:, :, 0], expected.bfloat16(), rtol=0, atol=0.005)
        torch.testing.assert_close(cache.state(0)[0, ..., 8:-1], expected, rtol=0, atol=1e-5)


def test_state_has_the_tokens_that_a_window_reaches() -> None:
    for policy, tokens in zip(OPTIONS, (1, 1, 1, 11), strict=True):
        query, key, value = (tensor.detach() for tensor in layer(20))
        assert policy.extend(None, key, value, query, context(20, 2)).state.shape == (tokens, 2, 2, 17)

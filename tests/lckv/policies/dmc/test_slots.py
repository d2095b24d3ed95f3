"""Decoding token by token against the parallel evaluation with hard decisions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.attention.visibility import Visibility
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from lckv.policies.dmc.slots import DMCSlots
from tests.lckv.policies.dmc.models import attend, context, documents_of, layer


def read(query, slots):
    """Attention of queries [1, b, h, d] to all slots in use, 0 where there are none: [b, h, d]."""
    group = query.shape[2] // slots.key.shape[2]
    key, value = (tensor.repeat_interleave(group, 2) for tensor in (slots.key, slots.value))
    scores = torch.einsum("bhd,nbhd->bhn", query[0], key) * query.shape[-1] ** -0.5
    unused = torch.arange(len(key)) >= slots.lengths.repeat_interleave(group, 1)[..., None]
    probabilities = scores.masked_fill(unused, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhn,nbhd->bhd", probabilities, value)


def slots_for(policy, key, capacity=2):
    _, rows, kv_heads, head_dim = key.shape
    return DMCSlots(policy, rows=rows, kv_heads=kv_heads, head_dim=head_dim, dtype=key.dtype, capacity=capacity)


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 20),
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    spread=st.sampled_from([0.5, 3.0]),
)
def test_equals_parallel_evaluation(kv_heads, group, window, lengths, spread):
    longest = max(map(sum, lengths))
    lengths = [[*row, longest - sum(row)] if sum(row) < longest else row for row in lengths]
    rows, documents = len(lengths), documents_of(lengths)
    query, key, value = (tensor.detach() for tensor in layer(longest, rows, kv_heads, group, spread=spread))
    policy = DMCPolicy(DMCConfig(stage="finetune", window=window))
    facts = context(longest, rows, documents=documents)
    key_value, statistics = policy.keys_values(key, value, query, facts)
    rotated = policy.query(query, facts)
    parallel = attend(rotated, key_value, Visibility(documents=documents))
    one_behind = attend(rotated, key_value, Visibility(exclude_self=True, documents=documents))

    starts = torch.zeros(rows, longest, dtype=torch.bool)
    starts.view(-1)[documents.cu_seqlens[:-1].long()] = True
    state, opened = slots_for(policy, key), torch.zeros(rows, kv_heads)
    for token in range(longest):
        state.reset(starts[:, token])
        now = slice(token, token + 1)
        # A cyclic layer reads before the slots know of the token.
        torch.testing.assert_close(read(rotated[now], state.slots), one_behind[token], rtol=0, atol=2e-5)
        before = state.slots.lengths.clone()
        slots = state.update(key[now], value[now], query[now], context(1, rows, start=token))
        opened += slots.lengths - before
        torch.testing.assert_close(read(rotated[now], slots), parallel[token], rtol=0, atol=2e-5)
    torch.testing.assert_close(1 - opened / longest, statistics.merge_rate)


def decoded(policy, tensors, tokens, **facts):
    query, key, value = tensors
    state = slots_for(policy, key)
    for token in tokens:
        now = slice(token, token + 1)
        state.update(key[now], value[now], query[now], context(1, key.shape[1], start=token, **facts))
    return state


@pytest.mark.parametrize("window", [3, None])
def test_rows_that_are_not_counted_keep_their_slots(window):
    policy = DMCPolicy(DMCConfig(stage="finetune", window=window))
    tensors = [tensor.detach() for tensor in layer(12)]
    state, expected = decoded(policy, tensors, range(8)), decoded(policy, tensors, range(8))
    for token in range(8, 12):
        now = slice(token, token + 1)
        for each, counted in ((state, torch.tensor([[True, False]])), (expected, None)):
            query, key, value = (tensor[now] for tensor in tensors)
            each.update(key, value, query, context(1, 2, start=token, counted=counted))
    only_first = decoded(policy, tensors, range(8))
    for name in ("key", "value"):
        found, whole, short = (getattr(each.slots, name) for each in (state, expected, only_first))
        used = len(short)
        assert torch.equal(found[:, 0], whole[:, 0])
        assert torch.equal(found[:used, 1], short[:, 1])
        assert found[used:, 1].count_nonzero() == 0
    assert torch.equal(state.slots.lengths[1], only_first.slots.lengths[1])
    assert torch.equal(state.members[1], only_first.members[1])


def test_a_row_that_never_counted_is_empty():
    policy = DMCPolicy(DMCConfig(stage="finetune"))
    state = decoded(policy, [tensor.detach() for tensor in layer(4)], range(4), counted=torch.tensor([[True, False]]))
    assert state.slots.lengths[1].tolist() == [0, 0]
    assert state.slots.key.isfinite().all()
    assert state.slots.key[:, 1].count_nonzero() == 0


def test_memory_grows_with_the_slots_and_not_with_the_tokens():
    policy = DMCPolicy(DMCConfig(stage="finetune"))
    query, key, value = (tensor.detach() for tensor in layer(200))
    key[..., -1] = 6.0
    state = decoded(policy, (query, key, value), range(200))
    assert state.slots.lengths.unique().tolist() == [1]
    assert state.members.unique().tolist() == [200]
    assert len(state.slots.key) == 2
    bytes_with_one_slot = state.num_bytes
    key[..., -1] = 4.0
    state = decoded(policy, (query, key, value), range(200))
    assert state.slots.lengths.unique().tolist() == [200]
    assert len(state.slots.key) == 256
    features = 254 * 2 * 2 * 2 * 8 * 4
    assert state.num_bytes == bytes_with_one_slot + features


def test_half_precision_slots_hold_sums_in_float32():
    policy = DMCPolicy(DMCConfig(stage="finetune", window=None, eps=0.01))
    query, key, value = (tensor.detach().bfloat16() for tensor in layer(40))
    key[..., -1] = 6.0
    slots = decoded(policy, (query, key, value), range(40)).slots
    assert slots.value.dtype == torch.bfloat16
    weight = policy.importance(query, 2)[..., None]
    expected = (value.float() * weight).sum(0) / weight.sum(0)
    torch.testing.assert_close(slots.value[0], expected.bfloat16(), rtol=0, atol=0.01)

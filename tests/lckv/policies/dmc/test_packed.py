"""Slots packed after the parallel evaluation against the slots that decoding makes token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.packed import pack_slots
from lckv.policies.dmc.policy import DMCPolicy
from tests.lckv.policies.dmc.models import context, layer
from tests.lckv.policies.dmc.test_slots import decoded


@given(tokens=st.integers(1, 24), window=st.none() | st.integers(1, 12), spread=st.sampled_from([0.5, 3.0]))
def test_packed_slots_are_those_of_decoding(tokens: int, window: int | None, spread: float) -> None:
    policy = DMCPolicy(DMCConfig(stage="finetune", window=window))
    query, key, value = (tensor.detach() for tensor in layer(tokens, 2, 2, 2, spread=spread))
    packed = pack_slots(policy.keys_values(key, value, query, context(tokens, 2))[0])
    slots = decoded(policy, (query, key, value), range(tokens)).slots
    assert torch.equal(packed.lengths.long(), slots.lengths)
    sizes = packed.lengths.flatten().tolist()
    for kind in ("key", "value"):
        parts = iter(getattr(packed, kind).split(sizes))
        for row in range(2):
            for head in range(2):
                expected = getattr(slots, kind)[: slots.lengths[row, head], row, head]
                torch.testing.assert_close(next(parts), expected, rtol=0, atol=2e-5)


def test_bytes_are_those_of_the_slots() -> None:
    policy = DMCPolicy(DMCConfig(stage="finetune"))
    query, key, value = (tensor.detach() for tensor in layer(40, 2, 2, 2, spread=3.0))
    packed = pack_slots(policy.keys_values(key, value, query, context(40, 2))[0])
    slots = int(packed.lengths.sum())
    assert slots < 40 * 2 * 2
    assert packed.num_bytes == slots * 2 * key.shape[-1] * key.element_size() + 4 * 4


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_has_no_slots(padding: int) -> None:
    policy = DMCPolicy(DMCConfig(stage="finetune"))
    query, key, value = (tensor.detach() for tensor in layer(12, 1, 1, 1, spread=3.0))
    counted = torch.arange(12)[:, None] < 12 - padding
    facts = context(12, 1, counted=counted)
    short = [tensor[: 12 - padding] for tensor in (key, value, query)]
    expected = pack_slots(policy.keys_values(*short, context(12 - padding, 1))[0])
    found = pack_slots(policy.keys_values(key, value, query, facts)[0], counted)
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.value, expected.value)

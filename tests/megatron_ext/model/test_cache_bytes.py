"""Sharing and merging together: the bytes of KV cache that are allocated are divided by both."""

import pytest
import torch

from lckv.config import CompressionConfig
from lckv.policies.dmc.packed import pack_slots
from tests.megatron_ext.model.stages import MERGING, draw_tokens, make_stage, positions_of
from tests.ranks import run_on_ranks

LCKV = "0_4_4_4_4_5"  # keys and values in 3 of 6 layers


@pytest.mark.parametrize("layer_types", [None, LCKV, "0_1_2_3_3_3"])
def test_the_product_of_both_compressions(layer_types: str | None) -> None:
    plain, _ = run_on_ranks(1, allocated_bytes, CompressionConfig())[0]
    shared, layers = run_on_ranks(1, allocated_bytes, CompressionConfig(layer_types))[0]
    both, ratio = run_on_ranks(1, allocated_bytes, CompressionConfig(layer_types, policy=MERGING))[0]
    assert layers == 1.0
    assert ratio > 1.1
    assert plain / shared == {None: 1.0, LCKV: 2.0, "0_1_2_3_3_3": 1.5}[layer_types]
    assert plain / both == pytest.approx(plain / shared * ratio, rel=1e-6)


def allocated_bytes(compression: CompressionConfig) -> tuple[int, float]:
    """Bytes of the keys and values that decoding 2 x 48 tokens would have to keep, lengths of slots left out; and tokens per slot by
    the merge rates that the model reports."""
    stage = make_stage(compression).eval()
    kept = {}

    def record(index: int, forward):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            output = forward(*args)
            if output.own is not None:
                kept[index] = output.own
            return output

        return call

    for index, layer in enumerate(stage.decoder.layers):
        layer.forward = record(index, layer.forward)
    tokens = draw_tokens(2, 48)
    with torch.no_grad():
        _, report = stage(tokens, positions_of(tokens))
    assert sorted(kept) == list(stage.config.layer_types.kv_layers)
    if not report.merge_rates:
        return sum(tensor.numel() * tensor.element_size() for own in kept.values() for tensor in own), 1.0
    packed = [pack_slots(own) for own in kept.values()]
    rate = torch.stack(list(report.merge_rates.values())).double().mean().item()
    return sum(slots.num_bytes - slots.lengths.nbytes for slots in packed), 1 / (1 - rate)

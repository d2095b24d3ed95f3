"""Rows of projections by the channels that they make."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lckv.config import CompressionConfig
from megatron_ext.config import ParallelConfig
from megatron_ext.model.channel_rows import StageChannelRows, fused_rows, lone_rows
from tests.megatron_ext.model.stages import make_stage
from tests.ranks import run_on_ranks

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "dmc" / "e_zero_rows.safetensors"
KINDS = ("query", "key", "value")


def decision_rows(query_heads: int, kv_heads: int, head_dim: int) -> list[int]:
    """Of the last channel of queries and keys."""
    kinds = ("query", "key")
    return sorted(row for kind in kinds for row in fused_rows(query_heads, kv_heads, head_dim, kind, -1))


def test_rows_that_the_public_code_zeroes() -> None:
    with safe_open(GOLDEN, "pt") as file:
        recorded = json.loads(file.metadata()["json"])["rows"]
        weight, expected = (file.get_tensor(f"weight_{when}_H4_KV2_D16") for when in ("before", "after"))
    for layout, rows in recorded.items():
        query_heads, kv_heads, head_dim = (int(part.lstrip("HKVD")) for part in layout.split("_"))
        assert decision_rows(query_heads, kv_heads, head_dim) == rows
    weight[decision_rows(4, 2, 16)] = 0
    assert torch.equal(weight, expected)


def test_a_layer_that_only_reads_makes_queries() -> None:
    assert lone_rows(2, 16, "query", -1) == [15, 31]
    assert lone_rows(2, 16, "key", -1) == lone_rows(2, 16, "value", 0) == []
    assert lone_rows(2, 16, "first query", -1) == []


def test_the_first_query_head_of_each_group() -> None:
    assert fused_rows(6, 2, 8, "first query", -1) == [7, 47]
    assert fused_rows(6, 2, 8, "query", -1) == [7, 15, 23, 47, 55, 63]


def test_kinds_share_out_all_rows() -> None:
    rows = [row for kind in KINDS for channel in range(8) for row in fused_rows(6, 2, 8, kind, channel)]
    assert sorted(rows) == list(range((6 + 2 * 2) * 8))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_out_the_rows_of_a_channel(ranks: int) -> None:
    """Also those of one KV head, where there are more ranks than KV heads."""
    counts = run_on_ranks(ranks, rows_made_one, ranks)
    # of two layers with 4 query heads and 2 KV heads, one of which only reads; weights and biases
    assert {kind: sum(count[kind] for count in counts) for kind in counts[0]} == {
        "query": 16,
        "key": 4,
        "value": 4,
        "first query": 4,
    }


def rows_made_one(ranks: int) -> dict[str, int]:
    parallel = ParallelConfig(tensor_model_parallel_size=ranks)
    stage = make_stage(CompressionConfig("0_0"), parallel, num_layers=2, add_qkv_bias=True)
    rows, counts = StageChannelRows(stage), {}
    for kind in KINDS:
        views = list(rows(kind, -1))
        for view in views:
            view.fill_(1.0)
        counts[kind] = len(views)
    counts["first query"] = len(list(rows("first query", -1)))
    parameters = [
        getattr(layer.self_attention, "linear_qkv" if layer.self_attention.computes_kv else "linear_q")
        for layer in stage.decoder.layers
    ]
    ones = sum(int((parameter == 1).all(-1).sum()) for module in parameters for parameter in (module.weight,))
    assert ones == sum(counts[kind] for kind in KINDS) // 2, "views reach the weights themselves"
    return counts

"""The benchmark of activation memory, on a tiny model."""

from lckv_megatron.layouts import LAYOUTS
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks
from tools.benchmarks.activation_memory import measure

MODEL = ModelConfig(
    hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, vocab_size=40
)
LAYER_INPUT = 2 * 16 * 32 * 4


def measured(recompute: str) -> list[dict[str, object]]:
    initialize(ParallelConfig(), seed=1)
    train = TrainConfig(micro_batch_size=2, seq_length=16, precision="fp32", recompute_granularity=recompute)
    return [row for each in LAYOUTS[:3] for row in measure(each.name, each.layer_types, (2, 4), MODEL, train)]


def test_rows_of_full_recompute() -> None:
    (rows,) = run_on_ranks(1, measured, "full")
    assert [(row["map"], row["layers"]) for row in rows] == [
        (name, layers) for name in ("plain", "CLA", "YOCO") for layers in (2, 4)
    ]
    plain = rows[:2]
    assert [row["predicted_bytes"] for row in plain] == [2 * LAYER_INPUT, 4 * LAYER_INPUT]
    assert [row["saved_growth"] for row in plain] == ["", 1.0]
    assert all(row["peak_bytes"] >= row["saved_bytes"] > row["predicted_bytes"] for row in rows)
    assert len({frozenset(row) for row in rows}) == 1


def test_nothing_is_predicted_without_recompute() -> None:
    (rows,) = run_on_ranks(1, measured, "none")
    assert {row["predicted_bytes"] for row in rows} == {""}
    assert rows[1]["saved_growth"] > 10

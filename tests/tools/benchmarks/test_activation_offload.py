"""The benchmark of activations on the host measures what it says."""

from lckv_megatron.layouts import LAYOUTS
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks
from tools.benchmarks.activation_offload import MAPS, measure


def test_rows() -> None:
    run_on_ranks(1, check_rows)


def check_rows() -> None:
    assert set(MAPS) <= {layout.name for layout in LAYOUTS}
    initialize(ParallelConfig(), seed=1)
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=50)
    train = TrainConfig(precision="fp32", seq_length=64)
    none, full, nothing, everything = measure("plain", model, train, (0.0, 1.0), repeats=1)
    assert none["time_ratio"] == 1 and none["host_bytes"] == full["host_bytes"] == 0
    layer_input = 32 * 4
    assert full["device_bytes"] >= layer_input
    # a block of 256 bytes, that is 2 bytes per token and layer, is sometimes freed late
    assert max(abs(row["device_bytes"]) for row in (nothing, everything)) <= 4
    # input, attention output and its logsumexp
    assert nothing["host_bytes"] == layer_input * 2 + 2 * 4
    assert everything["host_bytes"] > 4 * nothing["host_bytes"]
    # what the device keeps otherwise, and at most two numbers per token more
    assert 0 <= everything["host_bytes"] - none["device_bytes"] <= 2 * 4
    assert nothing["buffers_bytes"] == everything["buffers_bytes"] > 0

"""When layers run, as a traced dry run tells it, and what they keep."""

from itertools import pairwise

import pytest

from lckv.sharing.plan import LayerRun, Part
from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.rank import simulate
from lckv_megatron.memory_plan.blocks import kept_sizes
from lckv_megatron.memory_plan.requests import live_peak
from lckv_megatron.memory_plan.trace import Trace
from megatron_ext.command_line import parse_run_config
from megatron_ext.model.layer_memory import LayerMemory

SIZES = [
    "--model.num_layers=4", "--model.hidden_size=256", "--model.num_attention_heads=4",
    "--model.vocab_size=64", "--train.seq_length=1024", "--train.global_batch_size=2", "--data.mock=true",
    "--train.precision=bf16",
]  # fmt: skip
CYCLIC = [
    "--compression.layer_types", "0_2_2_3", "--compression.forward_passes", "2",
    "--compression.backward_passes", "1", "--train.recompute_granularity", "full",
    "--train.recompute_num_layers", "1",
]  # fmt: skip


OFFLOADED = [
    "--train.activation_offload", "token_wise", "--train.offload_fraction", "0.5",
    "--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true",
]  # fmt: skip


def traced(*options: str) -> tuple[Trace, int]:
    """The trace of a run of one replica, and the peak that the dry run tells."""
    run = parse_run_config([*SIZES, *options])
    ranks = run.parallel.replica_size
    result = simulate(run, rank=0, world_size=ranks, vocab_size=64, machine=Machine(), traced=True)
    assert result.trace is not None
    return result.trace, result.memory.peak_bytes


@pytest.fixture(scope="module")
def plain() -> tuple[Trace, int]:
    return traced()


@pytest.fixture(scope="module")
def cyclic() -> tuple[Trace, int]:
    return traced(*CYCLIC)


def test_layers_go_up_and_come_down(plain) -> None:
    trace, _ = plain
    stretches = trace.step_stretches()
    assert {stretch.name for stretch in stretches} == {"layer"}
    in_time = sorted(stretches, key=lambda stretch: stretch.start)
    assert [(stretch.direction, stretch.layer) for stretch in in_time] == 2 * [
        *(("forward", layer) for layer in (1, 2, 3, 4)),
        *(("backward", layer) for layer in (4, 3, 2, 1)),
    ]  # two micro-batches
    assert all(first.end <= second.start for first, second in pairwise(in_time))
    forwards, backwards = (
        {stretch.run for stretch in stretches if stretch.direction == direction}
        for direction in ("forward", "backward")
    )
    assert forwards == backwards


def test_of_layers_whose_activations_go_to_the_host_nothing_stays() -> None:
    trace, _ = traced(*OFFLOADED)
    in_time = sorted(trace.step_stretches(), key=lambda stretch: stretch.start)
    assert [(stretch.name, stretch.direction, stretch.layer) for stretch in in_time] == 2 * [
        *(("layer", "forward", layer) for layer in (1, 2, 3, 4)),
        *(("layer", "backward", layer) for layer in (4, 3, 2, 1)),
    ]
    # what a layer hands on is kept until its copy has left, not until its backward
    backward = {stretch.layer: stretch.start for stretch in in_time[4:8]}
    first = in_time[0]
    made = [request for request in trace.step_requests() if first.start <= request.start < first.end]
    assert len(made) > 10
    assert [request for request in made if request.end > backward[4] and request.bytes > 4096] == []


def test_the_trace_has_the_bytes_of_the_dry_run(plain, cyclic) -> None:
    for trace, peak in (plain, cyclic):
        assert trace.persistent + live_peak(trace.step_requests()) == peak


def test_a_layer_keeps_what_the_formulas_say(plain) -> None:
    trace, _ = plain
    run = parse_run_config(SIZES)
    memory = LayerMemory(run.model, run.compression, run.parallel, run.train, fused=True)
    sizes = kept_sizes(trace.step_requests(), trace.step_stretches())
    assert [*sizes] == [1, 2, 3, 4]
    layer = LayerRun(index=1, part=Part.WHOLE, reads=None, computes_kv=True, hands=False, drops=())
    keys_values = 2 * 2 * 256 * 1024  # the formulas count them apart
    expected = memory.kept(layer) + keys_values
    assert sum(sizes[2]) == pytest.approx(expected, rel=0.02)


def test_passes_without_gradient_and_recomputation_are_runs_of_their_own(cyclic) -> None:
    trace, _ = cyclic
    runs = {(stretch.name, stretch.layer) for stretch in trace.step_stretches()}
    assert {("MLP without gradient", 2), ("keys and values without gradient", 3), ("layer", 3)} <= runs
    first = [stretch for stretch in trace.step_stretches() if stretch.layer == 1]
    in_time = [(stretch.name, stretch.direction) for stretch in sorted(first, key=lambda s: s.start)]
    # kept nothing going forward, again in backward
    assert in_time[:3] == [
        ("layer without gradient", "forward"), ("layer", "forward"), ("layer", "backward"),
    ]  # fmt: skip

"""Activations on the host, dry run: copies beside the computation, bytes, memory, what is computed again."""

from dataclasses import replace

import pytest
import torch

from lckv_megatron.dry_run.hardware import Efficiency, Machine
from lckv_megatron.dry_run.host import HostUse, PretendedLink, PretendedPool
from lckv_megatron.dry_run.rank import RankRun, simulate
from lckv_megatron.dry_run.recorder import Recorder
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.model.offload_share import OffloadShare

EXACT = Machine(efficiency=Efficiency(products=1, memory=1, links=1, latency_seconds=0))
RUN = parse_run_config(
    [
        "--model.num_layers=2", "--model.hidden_size=128", "--model.num_attention_heads=4",
        "--model.num_query_groups=2", "--model.vocab_size=64", "--train.seq_length=2048",
        "--train.global_batch_size=1", "--data.mock=true", "--train.activation_offload=token_wise",
        "--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true",
        "--parallel.context_parallel_size=2",
    ]
)  # fmt: skip
WINDOWS = {"layer_types": "0s_1_1", "sliding_window": 64}


def offloading(share: float, *, layers: int = 2, **settings: object) -> RunConfig:
    train = replace(RUN.train, offload_fraction=share, **settings)
    return replace(RUN, train=train, model=replace(RUN.model, num_layers=layers))


def dry_run(run: RunConfig) -> tuple[RankRun, HostUse]:
    result = simulate(run, rank=1, world_size=4, vocab_size=64, machine=Machine())
    assert result.host is not None
    return result, result.host


@pytest.fixture(scope="module")
def half() -> tuple[RankRun, HostUse]:
    return dry_run(offloading(0.5))


@pytest.fixture(scope="module")
def none() -> tuple[RankRun, HostUse]:
    return dry_run(offloading(0.0))


def test_copies_run_one_after_the_other_beside_the_computation() -> None:
    recorder = Recorder(EXACT, None)
    link, pool = PretendedLink(recorder, 1e9), PretendedPool(recorder, 4096, pinned=False)
    on_host, on_device = pool.take(1000).memory[:1000], torch.empty(1000, dtype=torch.uint8)
    link.copy(on_host, on_device)
    there = link.mark()
    link.copy(on_device, on_host)
    back = link.mark()
    assert (there, back) == pytest.approx((1e-6, 2e-6))
    recorder.kernel(flops=0.75e-6 * 989.4e12, moved_bytes=0)
    link.wait(there)
    assert recorder.current.waited_seconds == pytest.approx(0.25e-6)
    link.wait(back)
    assert recorder.current.waited_seconds == pytest.approx(1.25e-6)
    link.copy(on_host, on_device)  # nothing is in front of it
    recorder.kernel(flops=1e-6 * 989.4e12, moved_bytes=0)
    link.wait(link.mark())
    assert recorder.current.waited_seconds == pytest.approx(1.25e-6)
    work = recorder.current
    assert (work.to_host_bytes, work.from_host_bytes) == (2000, 1000)
    assert pool.allocated == 4096
    assert recorder.allocations == []  # of the device


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_as_much_goes_to_the_host_as_is_predicted(share: float, half, none) -> None:
    _, host = half if share else none
    predicted = OffloadShare.of(offloading(share), vocab_size=64).settings(1.0).expected_bytes
    assert host.to_host == host.from_host == pytest.approx(predicted, rel=0.02)


def test_under_windows_no_more_goes_there_than_is_predicted() -> None:
    run = offloading(0.5, layers=3)
    run = replace(run, compression=replace(run.compression, **WINDOWS))
    _, host = dry_run(run)
    predicted = OffloadShare.of(run, vocab_size=64).settings(1.0).expected_bytes
    assert 0.85 * predicted < host.to_host <= predicted


def test_more_layers_take_no_more_of_the_device(half) -> None:
    few, of_few = half
    many, of_many = dry_run(offloading(0.5, layers=4))
    state = ("parameters", "gradients", "optimizer")
    beside = [run.memory.peak_bytes - sum(run.memory.peak[kind] for kind in state) for run in (few, many)]
    assert beside[1] == pytest.approx(beside[0], rel=0.01)
    assert of_many.to_host == pytest.approx(2 * of_few.to_host)


def test_what_is_computed_again_is_counted(half, none) -> None:
    (run, of_half), (all_again, of_none) = half, none
    # all products of a layer but that which makes its output
    assert 0 < of_none.again_flops < (all_again.flops - of_none.again_flops) / 3
    assert of_half.again_flops == pytest.approx(of_none.again_flops / 2)
    assert run.flops + of_half.again_flops == pytest.approx(all_again.flops)


def test_copies_that_are_not_hidden_are_waited_for(half) -> None:
    (fast, of_fast) = half
    slow, host = dry_run(offloading(0.5, offload_gigabytes_per_second=1.0))
    assert host.seconds == pytest.approx(20 * of_fast.seconds)
    assert of_fast.waited_seconds < host.waited_seconds < host.seconds
    computed = fast.busy_seconds - of_fast.waited_seconds
    assert slow.busy_seconds == pytest.approx(computed + host.waited_seconds)

"""Parts of the dry run by themselves: replaced attributes, collectives, links, storages and phases."""

import numpy as np
import pytest
import torch

from lckv.attention import flash
from lckv.attention.visibility import Visibility
from lckv_megatron.dry_run.collectives import Collective, Key, Total, add_up, kind_of, link_bytes
from lckv_megatron.dry_run.hardware import Efficiency, Machine, rates_of
from lckv_megatron.dry_run.memory import Allocation, Phase, curve
from lckv_megatron.dry_run.recorder import Recorder
from lckv_megatron.dry_run.replacements import Replacement, replaced
from lckv_megatron.dry_run.stand_ins import FlashAttention
from lckv_megatron.dry_run.world import pretended_world
from megatron_ext.config import ParallelConfig
from megatron_ext.gpus import GPUS

EXACT = Machine(efficiency=Efficiency(products=1, memory=1, links=1, latency_seconds=0))


def test_what_was_replaced_comes_back_after_an_error() -> None:
    class Parent:
        inherited = 1

    class Child(Parent):
        own = 2

    def fail() -> None:
        with replaced([Replacement(Child, "own", 3), Replacement(Child, "inherited", 4)]):
            assert (Child.own, Child.inherited) == (3, 4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (Child.own, Child.inherited) == (2, 1)
    assert "inherited" not in vars(Child)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("allreduce_", "all-reduce"),
        ("_allgather_base_", "all-gather"),
        ("allgather_into_tensor_coalesced_", "all-gather"),
        ("_reduce_scatter_base_", "reduce-scatter"),
        ("reduce_", "reduce"),
        ("reduce_scatter_tensor_coalesced_", "reduce-scatter"),
        ("alltoall_base_", "all-to-all"),
        ("recv_", "receive"),
        ("something_new_", "something_new_"),
    ],
)
def test_kinds_of_collectives(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


@pytest.mark.parametrize(
    ("kind", "number"),
    [("all-reduce", 1500), ("all-gather", 750), ("reduce-scatter", 750), ("send", 1000), ("receive", 0)],
)
def test_bytes_that_a_rank_sends(kind: str, number: float) -> None:
    assert link_bytes(kind, 4, 1000) == number


def test_collectives_are_added_by_key() -> None:
    key, other = Key("send", "pipeline", 2), Key("send", "data", 2)
    totals = add_up([Collective(key, 10, 1.0), Collective(other, 1, 1.0), Collective(key, 20, 2.0)])
    assert totals == {key: Total(2, 30, 3.0), other: Total(1, 1, 1.0)}
    assert totals[key].times(3) == Total(6, 90, 9.0)


def test_the_slowest_link_of_a_group_counts() -> None:
    inside, across = tuple(range(8)), (0, 8)
    assert EXACT.transfer_seconds(450e9, inside) == pytest.approx(1)
    assert EXACT.transfer_seconds(50e9, across) == pytest.approx(1)
    assert EXACT.transfer_seconds(450e9, (6, 7)) < EXACT.transfer_seconds(450e9, (7, 8))


def test_a_kernel_takes_as_long_as_its_products_or_its_memory() -> None:
    assert EXACT.work_seconds(989.4e12, 0) == pytest.approx(1)
    assert EXACT.work_seconds(989.4e11, 3350e9) == pytest.approx(1)
    assert Machine().work_seconds(989.4e12, 0) == pytest.approx(1 / 0.65)


def test_every_gpu_with_a_name_has_rates() -> None:
    for gpu in GPUS.values():
        assert rates_of(gpu).memory > rates_of(gpu).links > 0


def test_storages_get_their_kind_from_the_phases() -> None:
    phases = [Phase("build", 0, 1), Phase("forward", 1, 5), Phase("backward", 5, 9)]
    storages = [
        Allocation(100, 0, 0.0, 0, end=None, kind="parameters"),
        Allocation(10, 1, 0.1, 1, end=7, end_seconds=0.7),  # kept for backward
        Allocation(20, 2, 0.2, 1, end=3, end_seconds=0.3),  # gone before
        Allocation(40, 6, 0.6, 2, end=8, end_seconds=0.8),
    ]
    memory = curve(storages, phases, 1, 9)
    assert memory.peak_bytes == 150
    assert memory.peak == {
        "parameters": 100, "gradients": 0, "optimizer": 0, "activations": 10, "temporary": 40,
    }  # fmt: skip
    assert memory.most["activations"] == 10
    assert memory.bytes.sum(0).tolist() == [100, 110, 130, 110, 150, 140, 100]
    assert np.all(np.diff(memory.seconds) >= 0)


def test_the_recorder_sees_storages_work_and_their_ends() -> None:
    recorder = Recorder(EXACT, None, granularity=1)
    with recorder, recorder.phase("forward"):
        first = torch.ones(8, 16)
        view = first[:4]
        product = view @ torch.ones(16, 2)
    assert [allocation.bytes for allocation in recorder.allocations] == [512, 128, 32]
    assert recorder.allocations[1].end is not None
    assert recorder.work["forward"].flops == 2 * 4 * 16 * 2
    ended = recorder.now
    del first
    assert recorder.now == ended  # the view keeps the storage
    del view
    assert recorder.allocations[0].end == ended
    assert product.shape == (4, 2)


def test_no_world_is_pretended_inside_of_another() -> None:
    parallel, before = ParallelConfig(), torch.nn.Module.bfloat16
    with pretended_world(parallel, rank=5, world_size=6, seed=1):
        assert torch.distributed.get_world_size() == 6
        assert torch.nn.Module.bfloat16 is not before
        with (
            pytest.raises(RuntimeError, match=r"torch\.distributed runs already in this process"),
            pretended_world(parallel, rank=0, world_size=2, seed=1),
        ):
            raise AssertionError
    assert not torch.distributed.is_initialized()
    assert torch.nn.Module.bfloat16 is before


def test_flash_attention_of_chunks_is_the_work_of_the_whole() -> None:
    def work(first: int, stop: int) -> float:
        recorder = Recorder(EXACT, fake=None)
        query, key, value = (torch.ones(1, heads, 64, 8, requires_grad=True) for heads in (4, 2, 2))
        kernel = FlashAttention(recorder)
        seen = query[:, :, first:stop], key[:, :, :stop], value[:, :, :stop]
        flash.attend(*seen, Visibility(), scale=1.0, kernel=kernel).sum().backward()
        return recorder.current.flops

    assert work(0, 64) == 7 * 2 * 8 * 4 * (64 * 65 / 2)
    assert work(0, 24) + work(24, 64) == work(0, 64)

"""Slices of the distributed optimizer: what Megatron would gather on one rank, written and read by each rank
for itself."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpointing import reading, slices
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.reading import read_entries
from megatron_ext.checkpointing.slices import main_key, rectangles
from tests.megatron_ext.checkpointing.test_moments import Moments, moments_of
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks


@given(st.data())
def test_rectangles_are_the_range_in_its_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    numbers = torch.arange(math.prod(shape))
    first = data.draw(st.integers(0, len(numbers)))
    last = data.draw(st.integers(first, len(numbers)))
    whole, blocks = numbers.view(shape), list(rectangles(shape, first, last))
    parts = [
        whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))].reshape(
            -1
        )
        for offsets, sizes in blocks
    ]
    assert torch.equal(torch.cat([numbers[:0], *parts]), numbers[first:last])
    assert len(blocks) <= max(1, 2 * len(shape) - 1)
    assert all(math.prod(sizes) for _, sizes in blocks)


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by their keys, by the reader of this program."""
    from megatron.core.dist_checkpointing import ShardedTensor

    contents = read_contents(path)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in contents.state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    entries = [ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()]
    read_entries(entries, path, contents)
    return tensors


def as_megatron(patch: pytest.MonkeyPatch) -> None:
    """Saves what Megatron gathers: the format before slices."""

    def gathered(optimizer: Any, model: Any, stored: Any, metadata: Any) -> Any:
        return optimizer.sharded_state_dict(model, is_loading=stored is not None, metadata=metadata)

    from megatron_ext.checkpointing import state

    patch.setattr(state, "optimizer_entries", gathered)


def save_both(
    case: Case, directory: Path
) -> tuple[Moments, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    run = Run(case)
    run.train(2)
    ours = run.save(directory / "ours", 2)
    with pytest.MonkeyPatch.context() as patch:
        as_megatron(patch)
        theirs = run.save(directory / "theirs", 2)
    dist.barrier()
    return moments_of(run), stored_tensors(ours), stored_tensors(theirs)


def load(case: Case, directory: Path) -> tuple[Moments, Moments, list[float]]:
    """Moments and weights after loading either, and losses after it."""
    run = Run(case, seed=99)
    run.train(1)
    run.load(directory / "theirs")
    theirs = moments_of(run)
    run.train(1)
    run.load(directory / "ours")
    return moments_of(run), theirs, run.train(2)


@pytest.mark.parametrize(
    ("saved", "saved_ranks", "loaded", "loaded_ranks"),
    [
        (Case(), 2, Case(bf16=True, tp=2), 2),
        (Case(bf16=True), 4, Case(), 2),
        (Case(bf16=True, tp=2, overlap=True), 4, Case(bf16=True, pp=2), 4),
    ],
    ids=str,
)
def test_slices_are_what_megatron_gathers_and_either_can_be_loaded(
    tmp_path: Path, saved: Case, saved_ranks: int, loaded: Case, loaded_ranks: int
) -> None:
    moments, ours, theirs = run_on_ranks(saved_ranks, save_both, saved, tmp_path)[0]
    assert ours.keys() == {key for key in theirs if saved.bf16 or not key.startswith(main_key(""))}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    for mine, older, _ in run_on_ranks(loaded_ranks, load, loaded, tmp_path):
        for key, tensors in moments.items():
            for name, tensor in tensors.items():
                assert torch.equal(mine[key][name], tensor), f"{key} of {name}"
                assert torch.equal(older[key][name], tensor), f"{key} of {name}, gathered"


def save_and_count(case: Case, directory: Path, gathered: bool) -> tuple[int, int, int]:
    """(bytes of tensors that collectives move in a save, those of this rank's file, those of all state)."""
    run = Run(case)
    run.train(1)
    moved = 0

    def counting(collective: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal moved
            tensors = [part for part in arguments if isinstance(part, torch.Tensor)]
            moved += sum(tensor.nbytes for tensor in tensors)
            return collective(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        if gathered:
            as_megatron(patch)
        for name in ("all_gather", "all_gather_into_tensor", "gather", "broadcast", "all_reduce", "reduce"):
            patch.setattr(dist, name, counting(getattr(dist, name)))
            patch.setattr(dist.distributed_c10d, name, getattr(dist, name))
        path = run.save(directory, 1)
    dist.barrier()
    sizes = [part.stat().st_size for part in sorted(path.glob("*.distcp"))]
    return moved, sizes[dist.get_rank()], sum(sizes)


def test_no_state_is_sent_in_a_save_and_ranks_write_equal_parts(tmp_path: Path) -> None:
    case = Case(bf16=True, hidden_size=256)
    for moved, mine, whole in run_on_ranks(4, save_and_count, case, tmp_path / "ours", False):
        assert moved < whole / 100
        assert mine < 1.1 * whole / 4
    for moved, _, whole in run_on_ranks(4, save_and_count, case, tmp_path / "theirs", True):
        assert moved > whole / 10, "the count shows something"


def load_and_count(case: Case, directory: Path) -> tuple[int, int, int]:
    """(bytes of tensors that this rank reads, those it needs, those of the checkpoint)."""
    run = Run(case, seed=99)
    read, needed = 0, 0
    copy_block, fill = reading.PickledTensor.copy_block, reading._Reader.fill

    def counting(tensor: Any, offsets: Any, target: torch.Tensor) -> None:
        nonlocal read
        read += target.numel() * tensor.info.dtype.itemsize
        copy_block(tensor, offsets, target)

    def noting(reader: Any, entry: Any) -> None:
        nonlocal needed
        needed += entry.data.nbytes
        fill(reader, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.PickledTensor, "copy_block", counting)
        patch.setattr(reading._Reader, "fill", noting)
        run.load(directory)
    return read, needed, sum(part.stat().st_size for part in directory.rglob("*.distcp"))


@pytest.mark.parametrize(
    "loaded", [Case(bf16=True, hidden_size=256), Case(bf16=True, hidden_size=256, tp=2)], ids=str
)
def test_each_rank_reads_what_it_needs_and_no_more(tmp_path: Path, loaded: Case) -> None:
    run_on_ranks(4, save_and_count, Case(bf16=True, hidden_size=256), tmp_path, False)
    for read, needed, whole in run_on_ranks(4, load_and_count, loaded, tmp_path):
        assert read == needed
        assert read < 1.1 * whole / 4


def save_shapes(directory: Path, hidden_size: int) -> tuple[int, int]:
    """(bytes of tensors that a save and a load make at most at once, those of this rank's file)."""
    from lckv_megatron.measuring.timing import peak_bytes

    run = Run(Case(bf16=True, hidden_size=hidden_size))
    run.train(1)
    peak = max(
        peak_bytes(lambda: run.save(directory, 1)),
        peak_bytes(lambda: run.load(directory, verify_hashes=True)),
    )
    return peak, (directory / "iter_0000001" / f"__{dist.get_rank()}_0.distcp").stat().st_size


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small = run_on_ranks(2, save_shapes, tmp_path / "small", 64)
    large = run_on_ranks(2, save_shapes, tmp_path / "large", 256)
    for (little, _), (much, size) in zip(small, large, strict=True):
        assert size > 2**20
        assert much < little + size / 20


PADDED = Case(hidden_size=16, padded_buckets=True)


def save_and_go_on(directory: Path) -> list[float]:
    run = Run(PADDED)
    run.train(2)
    run.save(directory, 2)
    return run.train(2)


def resume(directory: Path) -> tuple[int, list[float]]:
    run = Run(PADDED, seed=99)
    run.load(directory)
    return len(run.optimizer.chained_optimizers[0].optimizer.state), run.train(2)


def test_a_rank_all_of_whose_range_is_padding_takes_part(tmp_path: Path) -> None:
    straight = run_on_ranks(2, save_and_go_on, tmp_path)
    resumed = run_on_ranks(2, resume, tmp_path)
    assert resumed[0][0] > 0 and resumed[1][0] == 0
    assert [losses for _, losses in resumed] == straight


def save_with_a_gap(directory: Path) -> str:
    run = Run(Case(bf16=True))
    blocks = slices._blocks

    def without_the_last(*arguments: Any) -> Any:
        yield from list(blocks(*arguments))[:-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_blocks", without_the_last)
        try:
            run.save(directory, 1)
        except RuntimeError as error:
            return str(error)
    return ""


def test_blocks_that_are_missing_are_an_error_of_the_save(tmp_path: Path) -> None:
    for message in run_on_ranks(2, save_with_a_gap, tmp_path):
        assert "the blocks of optimizer.state." in message
        assert "do not make up" in message
    assert list(tmp_path.glob("*iter*")) == []

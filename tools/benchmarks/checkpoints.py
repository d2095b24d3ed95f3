"""What a save and a load of a run cost, beside torch.save and torch.load of the same bytes with a hash.

    python -m tools.benchmarks.checkpoints --output tools/benchmarks/results/checkpoints.csv

Each number is that of one process; with several ranks the largest of them. cpu_seconds: those in which the
process computed, of use where other programs run meanwhile. ratio_to_torch: to what torch.save (torch.load)
and sha256 of the file take for as many bytes as the rank writes, in the same round. peak_bytes: tensors that
are alive at once, in addition to those from before. file_bytes: what the rank has written; state_bytes: the
whole checkpoint.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from lckv_megatron.measuring.timing import peak_bytes, setting, write_csv
from megatron_ext.checkpointing.load import load_checkpoint
from megatron_ext.checkpointing.save import saves
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.process_groups import destroy, initialize
from tools.benchmarks.save_stall import Trained

_NUMBERS = 2**21
"""Of each tensor of torch's file."""
_PIECE_BYTES = 2**20


class Case:
    """One run, and torch's file of as many bytes as it saves."""

    def __init__(self, hidden_size: int, precision: str, folder: Path) -> None:
        self.trained = Trained(hidden_size, precision)
        self.trained.step()
        self.folder, self._torch_file = folder, folder / f"torch_{torch.distributed.get_rank()}.pt"
        self.save()
        self.file_bytes = self.checkpoint_file().stat().st_size
        count = self.file_bytes // 4
        self._tensors = [torch.randn(min(_NUMBERS, count - at)) for at in range(0, count, _NUMBERS)]

    def checkpoint_file(self) -> Path:
        """The one that this rank writes."""
        return self.folder / "run" / "iter_0000001" / f"__{torch.distributed.get_rank()}_0.distcp"

    def state_bytes(self) -> int:
        """Of the whole checkpoint."""
        return sum(path.stat().st_size for path in (self.folder / "run").rglob("*") if path.is_file())

    def save(self) -> None:
        """A save of the run."""
        with saves(self.folder / "run") as made:
            made.save(1, self.trained.state())

    def load(self) -> None:
        """A load into the run."""
        load_checkpoint(
            self.folder / "run",
            model=[self.trained.model],
            optimizer=self.trained.optimizer,
            scheduler=self.trained.scheduler,
            expected_model={},
        )

    def torch_save(self) -> None:
        """torch.save until the file is on the disk, and its hash."""
        torch.save(self._tensors, self._torch_file)
        descriptor = os.open(self._torch_file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        _hash(self._torch_file)

    def torch_load(self) -> None:
        """The hash of the file, and torch.load."""
        _hash(self._torch_file)
        torch.load(self._torch_file)

    def forget_checkpoint(self) -> None:
        """So that a save finds no older one, and as much free memory for its pages as torch.save."""
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(self.folder / "run", ignore_errors=True)
        torch.distributed.barrier()

    def forget_torch_file(self) -> None:
        """As `forget_checkpoint`."""
        self._torch_file.unlink(missing_ok=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def measure(rank: int, ranks: int, port: int, options: Any, precision: str, results: Any) -> None:
    """One rank's numbers, for `results`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    initialize(ParallelConfig(), seed=1)
    case = Case(options.hidden_size, precision, Path(options.folder))
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "torch.save": (case.forget_torch_file, case.torch_save),
        "save": (case.forget_checkpoint, case.save),
        "torch.load": (torch.distributed.barrier, case.torch_load),
        "load": (torch.distributed.barrier, case.load),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, (prepare, act) in ways.items():
            prepare()
            started = time.process_time()
            act()
            seconds[name].append(time.process_time() - started)
    peaks = {}
    for name, (prepare, act) in ways.items():
        prepare()
        peaks[name] = peak_bytes(act)
    results.put((rank, seconds, peaks, case.file_bytes, case.state_bytes()))
    torch.distributed.barrier()
    destroy()


def rows_of(options: Any, precision: str, ranks: int) -> Iterator[dict[str, object]]:
    """A row for saves and one for loads."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with TemporaryDirectory(dir=options.folder) as folder:
        given = argparse.Namespace(**{**vars(options), "folder": folder})
        port = 20000 + os.getpid() % 20000
        processes = [
            context.Process(target=measure, args=(rank, ranks, port, given, precision, results))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        parts = [results.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    for name in ("save", "load"):
        ratios = [
            statistics.median(
                ours / theirs for ours, theirs in zip(seconds[name], seconds[f"torch.{name}"], strict=True)
            )
            for _, seconds, *_ in parts
        ]
        yield {
            "way": name,
            "ranks": ranks,
            "precision": precision,
            "file_bytes": max(part[3] for part in parts),
            "state_bytes": max(part[4] for part in parts),
            "cpu_seconds": round(max(statistics.median(part[1][name]) for part in parts), 3),
            "torch_cpu_seconds": round(max(statistics.median(part[1][f"torch.{name}"]) for part in parts), 3),
            "ratio_to_torch": round(max(ratios), 2),
            "peak_bytes": max(part[2][name] for part in parts),
        }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--label", default="", help="a column of the rows: which version was measured")
    parser.add_argument("--folder", help="where files are written (default: the system's)")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    rows: list[dict[str, object]] = []
    for precision in options.precision:
        for ranks in options.ranks:
            for row in rows_of(options, precision, ranks):
                rows.append({"version": options.label, **row, **setting("cpu")})
                print("   ".join(f"{value}" for value in rows[-1].values()), flush=True)
    if options.output:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()

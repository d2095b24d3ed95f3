"""Profiles of chosen iterations on chosen ranks: a trace, ranges for nsys, a snapshot of CUDA's memory.

The passes of a sharing map have names in all of them, such as "group 1 pass 0 without gradient"
(`model/block.py`), and so have iterations.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_ext.config import ProfileConfig

logger = logging.getLogger(__name__)

ALL_RANKS = "all"
FOLDER_NAME = "profile"
_ROWS = 60
_MOST_EVENTS = 200_000
"""Allocations that a snapshot remembers."""


class Profiler:
    """Of one rank. Make it with `profiling`."""

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        first = config.start_iteration
        self._iterations = range(0) if first is None else range(first, first + config.num_iterations)
        if ALL_RANKS not in config.ranks and str(dist.get_rank()) not in config.ranks:
            self._iterations = range(0)
        self._kinds, self._folder = config.kinds, folder
        self._running: list[Callable[[str], None]] = []
        self._since = 0

    @contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Around the iteration: starts with the first that is to be profiled, and writes after the last."""
        if number in self._iterations and not self._running:
            self._since = number
            self._running = [_KINDS[kind](self._folder) for kind in self._kinds]
        with record_function(f"iteration {number}"):
            yield
        if self._running and number + 1 not in self._iterations:
            self.stop(number)

    def stop(self, last: int | None = None) -> None:
        """Ends what is running, and writes it. What fails is only logged: the run matters more."""
        running, self._running = self._running, []
        until = "" if last is None else f"_to_{last}"
        for stop in reversed(running):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                stop(f"rank_{dist.get_rank():05d}_iterations_{self._since}{until}")
            except OSError as error:
                logger.warning("profile.folder %s cannot be written: %s", self._folder, error)
        if running:
            logger.info("profiled iterations from %d on; see %s", self._since, self._folder)


@contextmanager
def profiling(config: ProfileConfig, save: str | None) -> Iterator[Profiler]:
    """The profiles of a run that saves into `save`."""
    folder = Path(config.folder) if config.folder is not None else Path(save or ".") / FOLDER_NAME
    profiler = Profiler(config, folder)
    try:
        yield profiler
    finally:
        profiler.stop()


def _torch(folder: Path) -> Callable[[str], None]:
    cuda = torch.cuda.is_available()
    running = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    running.start()

    def stop(name: str) -> None:
        running.stop()
        running.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
        column = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=column, row_limit=_ROWS, max_name_column_width=80)
        (folder / f"{name}.txt").write_text(table, encoding="utf-8")

    return stop


def _nsys(folder: Path) -> Callable[[str], None]:
    """nsys itself writes the file."""
    del folder
    ranges: Any = torch.autograd.profiler.emit_nvtx()
    torch.cuda.profiler.start()
    ranges.__enter__()

    def stop(name: str) -> None:
        ranges.__exit__(None, None, None)
        torch.cuda.profiler.stop()

    return stop


def _memory(folder: Path) -> Callable[[str], None]:
    torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)

    def stop(name: str) -> None:
        try:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    return stop


_KINDS: dict[str, Callable[[Path], Callable[[str], None]]] = {
    "torch": _torch,
    "nsys": _nsys,
    "memory": _memory,
}
"""Each starts, and gives what stops and writes under a name."""

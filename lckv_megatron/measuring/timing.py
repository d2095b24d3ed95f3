"""How long functions take and how much memory they need, compared fairly: in one process, in turns."""

import csv
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from itertools import accumulate
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu counts the seconds in which this process computed, on all its threads:
of use where other programs run meanwhile."""


def median_seconds(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, clock: str = "wall"
) -> dict[str, float]:
    """Median seconds of each function over `repeats` rounds, after `warmup` rounds that do not count.

    In a round every function runs once, so that whatever else the machine does meanwhile hits all of them
    alike. `clock` is one of CLOCKS.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            _synchronize()
            start = now()
            function()
            _synchronize()
            if number >= warmup:
                seconds[name].append(now() - start)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of tensors alive at once during `function`, in addition to those from before: CUDA's if there is
    CUDA, else the CPU's."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    return max(accumulate(_cpu_allocations(function), initial=0))


def held_bytes(function: Callable[[], object]) -> int:
    """Bytes of tensors that `function` leaves alive as long as its result is."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        del result
        return held
    return sum(_cpu_allocations(function))


def _cpu_allocations(function: Callable[[], object]) -> list[int]:
    """Bytes that the CPU's memory grows by, or less than 0 where it shrinks, in order, until `function` has
    returned its result."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its own start and stop
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # what others have left behind is not to be freed in between, and counted
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            result = function()
    finally:
        if collects:
            gc.enable()
    results = profile.kineto_results
    assert results is not None
    del result
    events = sorted(results.events(), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def setting(device: str) -> dict[str, str]:
    """Columns that say where and when a row was measured; `device` is cpu or cuda."""
    return {
        "hardware": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "python_torch": f"{platform.python_version()} {torch.__version__}",
        "date": date.today().isoformat(),
    }


def write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One line per row, named columns; raises OSError."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

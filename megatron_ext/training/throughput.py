"""Tokens per second, model FLOPs utilisation, memory.

    model_tflops_per_device = model FLOPs per token x tokens per second / devices / 1e12
    mfu = model_tflops_per_device / peak          hfu = the same with hardware FLOPs per token

Model FLOPs are what the method asks for, hardware FLOPs count recomputation in backward too (`lckv/cost.py`).
"""

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


def memory() -> dict[str, int]:
    """Bytes allocated on this process's CUDA device, or resident in this process without CUDA: now, and the
    most since the process began, under the names that reports have them by."""
    if torch.cuda.is_available():
        peak, current = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    else:
        current = psutil.Process().memory_info().rss
        peak = max(_peak_resident_bytes(), current)  # the kernel counts its peak now and then only
    return {"peak_memory_bytes": peak, "current_memory_bytes": current}


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins, on Linux, with the size of the parent process
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if peak is not None:
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Throughput:
    """From tokens and seconds to the speed of a run."""

    model_flops_per_token: float
    """FLOPs of one training step per token, as the method asks for them."""

    hardware_flops_per_token: float
    """The same with what is computed again in backward."""

    world_size: int
    """Number of devices."""

    peak_tflops: float | None
    """Dense peak of one device in TFLOP/s; None: no utilisation is reported."""

    def metrics(self, tokens: int, seconds: float) -> dict[str, float]:
        """Speed of processing `tokens` tokens, over all devices, in `seconds`;
        utilisations are fractions of 1."""
        per_device = tokens / seconds / self.world_size
        model_tflops = per_device * self.model_flops_per_token / 1e12
        speeds = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": per_device,
            "model_tflops_per_device": model_tflops,
        }
        if self.peak_tflops is not None:
            speeds["mfu"] = model_tflops / self.peak_tflops
            speeds["hfu"] = per_device * self.hardware_flops_per_token / 1e12 / self.peak_tflops
        return speeds

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

import torch

# Dense peaks in TFLOP/s: bf16 on tensor cores with fp32 accumulation, and fp32 without TF32 (PyTorch's
# default). The name is the first pattern that the device's name has. Data sheets print the doubled rate of
# sparse matrices; that is halved here. Sources, NVIDIA's data sheets and architecture whitepapers:
#   A100, A800, A30, A40, A10: data sheets; H100 and H800 (SXM, PCIe, NVL), H200, GH200: Hopper data sheets
# (SXM 1978.9, NVL
#   1671, PCIe 1513 with sparsity); H20: data sheet; B200, B300: HGX data sheet; GB200: NVL72 data sheet / 72;
# L4, L40, L40S: data
#   sheets; RTX 3090, A6000: GA102 whitepaper; RTX 4080, 4090, 6000 Ada: AD102 whitepaper; RTX 5090: RTX
# Blackwell whitepaper.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"GB200", 2500.0, 80.0),
    (r"B[23]00", 2250.0, 75.0),
    (r"GH200", 989.4, 66.9),
    (r"H200 NVL", 835.5, 60.0),
    (r"H200", 989.4, 66.9),
    (r"H[18]00 NVL", 835.5, 60.0),
    (r"H[18]00 PCIe", 756.5, 51.2),
    (r"H[18]00", 989.4, 66.9),
    (r"H20", 148.0, 44.0),
    (r"A[18]00", 312.0, 19.5),
    (r"A30", 165.0, 10.3),
    (r"A40", 149.7, 37.4),
    (r"A10", 125.0, 31.2),
    (r"L40S", 362.1, 91.6),
    (r"L40", 181.0, 90.5),
    (r"L4", 121.0, 30.3),
    (r"RTX 6000 Ada", 364.2, 91.1),
    (r"RTX A6000", 154.8, 38.7),
    (r"RTX 5090", 209.5, 104.8),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 4080", 97.5, 48.7),
    (r"RTX 3090", 71.0, 35.6),
)
# Slower chips whose names begin with a faster one's, and slices of a device.
_OTHERS = re.compile(r"\b(RTX \d+ (Ti|SUPER|D|Laptop)|MIG)\b", re.IGNORECASE)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak in TFLOP/s of a CUDA device, named as by torch.cuda.get_device_name; None where it is not
    known.

    `precision` is train.precision. bf16 is counted with fp32 accumulation,
    without sparsity; fp32 without TF32.
    """
    if _OTHERS.search(device_name):
        return None
    for pattern, bf16, fp32 in _PEAKS:
        if re.search(rf"\b{pattern}\b", device_name, re.IGNORECASE):
            return {"bf16": bf16, "fp32": fp32}.get(precision)
    return None


def memory_in_use() -> int:
    """Largest memory so far, in bytes: allocated on this process's CUDA device,
    or resident in this process without CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _peak_resident_bytes()


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

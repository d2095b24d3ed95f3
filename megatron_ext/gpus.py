"""What is known of GPUs by their names: peaks and memory. Torch is not loaded."""

import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

from megatron_ext.arguments import memory_size
from megatron_ext.errors import ConfigError

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


@dataclass(frozen=True)
class Gpu:
    """A GPU that a run is planned for."""

    name: str

    memory_bytes: int
    """As CUDA reports it."""

    device_name: str = ""
    """As torch.cuda.get_device_name tells it, for `peak_tflops`."""

    def peak_tflops(self, precision: str) -> float | None:
        """See `peak_tflops`."""
        return peak_tflops(self.device_name, precision)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", round(79.1 * 2**30), "NVIDIA H100 80GB HBM3"),
        Gpu("H200", round(139.8 * 2**30), "NVIDIA H200"),
        Gpu("B200", round(178.4 * 2**30), "NVIDIA B200"),
        Gpu("A100", round(79.1 * 2**30), "NVIDIA A100-SXM4-80GB"),
        Gpu("A100-40GB", round(39.4 * 2**30), "NVIDIA A100-SXM4-40GB"),
        Gpu("L40S", round(44.4 * 2**30), "NVIDIA L40S"),
        Gpu("A6000", round(47.4 * 2**30), "NVIDIA RTX A6000"),
        Gpu("RTX5090", round(31.3 * 2**30), "NVIDIA GeForce RTX 5090"),
        Gpu("RTX4090", round(23.5 * 2**30), "NVIDIA GeForce RTX 4090"),
        Gpu("RTX3090", round(23.6 * 2**30), "NVIDIA GeForce RTX 3090"),
        Gpu("L4", round(22.0 * 2**30), "NVIDIA L4"),
    )
}


def gpu_of(text: str) -> Gpu:
    """The GPU of this name, in any case, or any GPU with so much memory (48GiB).

    Raises ConfigError for anything else.
    """
    for name, gpu in GPUS.items():
        if name.lower() == text.replace(" ", "").lower():
            return gpu
    try:
        return Gpu(text, memory_size(text))
    except ArgumentTypeError as error:
        raise ConfigError(
            f"--gpu is {text!r}; it must be one of {', '.join(GPUS)}, or a size such as 48GiB."
        ) from error

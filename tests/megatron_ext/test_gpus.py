"""Peaks and memory of devices by their names."""

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.gpus import GPUS, gpu_of, peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_dense_peak_by_device_name(name, bf16):
    assert peak_tflops(name, "bf16") == bf16


def test_peak_of_other_precisions():
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_gpus_that_runs_are_planned_for():
    assert all(gpu.peak_tflops("bf16") for gpu in GPUS.values())
    assert gpu_of("h100").peak_tflops("bf16") == 989.4
    assert gpu_of("RTX 4090") is GPUS["RTX4090"]
    assert gpu_of("H100").memory_bytes < 80 * 2**30 < gpu_of("H200").memory_bytes
    assert gpu_of("48GiB").memory_bytes == 48 * 2**30 and gpu_of("48GiB").peak_tflops("bf16") is None
    with pytest.raises(ConfigError, match=r"--gpu is 'H10'; it must be one of H100, H200, .* or a size such"):
        gpu_of("H10")

"""Peaks of devices, memory, tokens per second and utilisation."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.training.throughput import Throughput, _peak_resident_bytes, memory


def test_memory_without_cuda_is_that_of_the_process_now_and_at_its_peak():
    program = (
        "from megatron_ext.training.throughput import memory\n"
        "before = memory()\n"
        "block = bytearray(b'x') * (400 << 20)\n"
        "during = memory()\n"
        "del block\n"
        "for state in (before, during, memory()):\n"
        "    print(*state.values())\n"
    )
    size_of_this_process = bytearray(b"x") * (800 << 20)  # must not be counted
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    del size_of_this_process
    (before, now), (_, during), (after, end) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert 10 << 20 < now <= before < 700 << 20  # importing a CUDA build of torch takes 500 MiB
    assert 200 << 20 < after - before < 450 << 20  # importing may have peaked above `before`
    assert 380 << 20 < during - now < 420 << 20 and end - now < 20 << 20  # what is given back is not current


def test_memory_where_there_is_no_proc(monkeypatch):
    expected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory()["peak_memory_bytes"] >= expected
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _peak_resident_bytes() < expected


def test_memory_with_cuda_is_what_was_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 678)
    assert memory() == {"peak_memory_bytes": 12345, "current_memory_bytes": 678}


def test_speed():
    meter = Throughput(
        model_flops_per_token=6e9, hardware_flops_per_token=8e9, world_size=4, peak_tflops=100.0
    )
    assert meter.metrics(80_000, 2.0) == {
        "tokens_per_second": 40_000.0,
        "tokens_per_second_per_device": 10_000.0,
        "model_tflops_per_device": pytest.approx(60.0),
        "mfu": pytest.approx(0.6),
        "hfu": pytest.approx(0.8),
    }


def test_no_utilisation_without_a_peak():
    meter = Throughput(
        model_flops_per_token=6e9, hardware_flops_per_token=8e9, world_size=1, peak_tflops=None
    )
    assert set(meter.metrics(10, 1.0)) == {
        "tokens_per_second",
        "tokens_per_second_per_device",
        "model_tflops_per_device",
    }

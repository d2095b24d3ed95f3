"""The doctor: what it finds on this machine, and what it says of machines that lack something."""

import importlib
import importlib.metadata
import json
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lckv_megatron import diagnosis
from lckv_megatron.commands import doctor
from lckv_megatron.diagnosis import Missing, OperationPath, Report

GIB = 2**30


def _missing(report: Report, beginning: str) -> Missing:
    (entry,) = [entry for entry in report.missing if entry.what.startswith(beginning)]
    return entry


def test_program_says_that_training_can_run_here() -> None:
    command = [sys.executable, "-m", "lckv_megatron", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["can_train"] is True
    for package in ("torch", "megatron-core"):
        assert report["found"][package].startswith(importlib.metadata.version(package))
    assert report["found"]["GPUs"] == "none", "conftest.py hides them"
    assert report["found"]["helpers_cpp of Megatron"] == "compiled"
    assert report["paths"]["processes talk over"]["choice"] == "gloo"
    assert report["paths"]["attention"]["choice"] == "sdpa"
    assert "FlashAttention 3 needs CUDA" in report["paths"]["attention"]["reason"]
    assert report["paths"]["layers"]["choice"] == "local"
    assert set(report["paths"]) >= {"RMSNorm", "SwiGLU", "RoPE", "optimizer adam", "cross-entropy"}


@pytest.mark.parametrize(("prevents", "status"), [(True, 1), (False, 0)])
def test_exit_status_tells_whether_training_can_run(
    prevents: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report({"python": "3.14"}, {"attention": OperationPath("sdpa", "because")})
    report.lacks("a wheel", "fetch one", prevents_training=prevents)
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert doctor.main([]) == status
    text = capsys.readouterr().out
    assert "sdpa (because)" in text
    assert "a wheel\n      fetch one" in text
    assert ("NEEDED: a wheel" in text) is prevents
    assert ("Training can run here." in text) is not prevents
    assert doctor.main(["--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["missing"] == [{"what": "a wheel", "remedy": "fetch one", "prevents_training": prevents}]


def _versions(**versions: str | None) -> Callable[[str], str | None]:
    return lambda name: versions.get(name.replace("-", "_"), "1.0")


def test_requirement_that_is_absent_or_out_of_range_prevents_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        diagnosis, "requirements", lambda: ["megatron-core>=0.16.1,<0.17", "psutil>=5.9", "torch>=2.6"]
    )
    monkeypatch.setattr(
        diagnosis, "_version", _versions(megatron_core="0.17.0", psutil=None, torch="2.13.0+cpu")
    )
    report = Report()
    diagnosis._requirements(report)
    assert report.facts["torch"] == "2.13.0+cpu (supported: >=2.6)"
    newer = _missing(report, "megatron-core")
    assert "0.17.0 is outside of the tested range" in newer.what
    assert newer.prevents_training
    assert _missing(report, "psutil") == Missing("psutil>=5.9", "pip install 'psutil>=5.9'", True)
    assert len(report.missing) == 2
    assert not report.can_train


def test_requirements_come_from_the_checkout_where_the_project_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "DISTRIBUTION", "a-name-that-is-not-installed")
    assert any(entry.startswith("megatron-core>=0.16.1") for entry in diagnosis.requirements())


def _gpu_machine(monkeypatch: pytest.MonkeyPatch, count: int, cuda: str | None) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_machine(monkeypatch, 2, "12.8")
    monkeypatch.setattr(diagnosis, "_driver_sees_gpus", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    report = Report()
    diagnosis._torch(report)
    assert report.facts["GPUs"] == "NVIDIA H100, 80 GiB, sm_90; NVIDIA H100, 80 GiB, sm_90"
    assert report.facts["NCCL"] == "2.27.5"
    assert report.missing == []


def test_gpus_that_torch_cannot_use_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_machine(monkeypatch, 0, None)
    monkeypatch.setattr(diagnosis, "_driver_sees_gpus", lambda: 8)
    report = Report()
    diagnosis._torch(report)
    entry = _missing(report, "torch cannot use the 8 GPU(s)")
    assert "it is a CPU build" in entry.what
    assert not entry.prevents_training, "the CPU still can"


def test_gpus_without_nccl_and_torch_without_gloo_prevent_training(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_machine(monkeypatch, 1, "12.8")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    report = Report()
    diagnosis._torch(report)
    assert _missing(report, "NCCL").prevents_training
    assert _missing(report, "gloo").prevents_training


def test_gpus_of_the_driver_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU 0: one\necho GPU 1: two\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert diagnosis._driver_sees_gpus() == 2
    program.write_text("#!/bin/sh\nexit 9\n")
    assert diagnosis._driver_sees_gpus() == 0


def test_optional_package_that_breaks_on_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "flash_attn":
            raise ImportError("undefined symbol: _ZN3c10")
        return SimpleNamespace()

    monkeypatch.setattr(diagnosis, "_version", _versions(transformer_engine=None))
    monkeypatch.setattr(importlib, "import_module", broken)
    report = Report({"GPUs": "NVIDIA H100"})
    diagnosis._optional_packages(report)
    assert "undefined symbol" in _missing(report, "flash-attn 1.0 cannot be imported").what
    assert "[gpu]" in _missing(report, "transformer-engine (optional").remedy
    assert len(report.missing) == 2
    assert report.can_train


def test_gpu_packages_are_not_missed_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_version", lambda name: None)
    report = Report({"GPUs": "none"})
    diagnosis._optional_packages(report)
    assert [entry.what.split()[0] for entry in report.missing] == ["wandb", "lm-eval"]


def test_missing_index_builder_prevents_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: None)
    report = Report()
    diagnosis._index_builder(report)
    entry = _missing(report, "helpers_cpp")
    assert entry.prevents_training
    assert "install a C++ compiler" in entry.remedy


def test_scarce_resources_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda path: usage(GIB // 16, 0, GIB // 16))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 2048))
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    report = Report()
    diagnosis._machine(report)
    assert "0.1 GiB found" in _missing(report, "10 GiB of free disk here").what
    assert "TMPDIR" in _missing(report, "1 GiB of free temporary disk").remedy
    assert "--shm-size" in _missing(report, "1 GiB of shared memory").remedy
    assert _missing(report, "a limit of 4096 open files (256 found)").remedy == "ulimit -n 2048"
    assert report.can_train


def test_step_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> OperationPath:
        raise RuntimeError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(diagnosis, "attention_backend", broken)
    report = diagnosis.examine()
    assert "libcudart" in _missing(report, "paths: RuntimeError").what
    assert not report.can_train
    assert "free disk here" in report.facts

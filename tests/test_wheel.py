"""The package that people install: what is in the wheel, and that it works where the checkout is not."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"lckv", "megatron_ext", "checkpoints_conversion", "lckv_megatron"}


def _run(*command: str, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LCKV_POLICIES")}
    result = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of the checkout, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "./source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the dependencies are those of the environment that tests."""
    folder = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin/python"))
    _run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Names of folders only: the .pth files in them, and with them an editable installation, are not read.
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(places)))
    return folder


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        entry_points = archive.read(points).decode()
    metadata = points.partition("/")[0]
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, "pretrain_lckv.py", metadata}
    assert "lckv-megatron = lckv_megatron.__main__:main" in entry_points
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "lckv/policies/dmc/README.md" in names
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {*modules, "pretrain_lckv.py"}


def test_an_installation_works_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    program = str(environment / "bin" / "lckv-megatron")
    place = _run(str(environment / "bin/python"), "-c", "import lckv; print(lckv.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(environment)
    assert "kv-memory" in _run(program, "--help", cwd=tmp_path)
    sizes = ("--model.num_layers", "4", "--model.hidden_size", "64", "--model.num_attention_heads", "4")
    fits = _run(program, "kv-memory", "--memory", "1GiB", *sizes, cwd=tmp_path)
    assert "KV bytes per token" in fits
    run = (*sizes, "--model.vocab_size", "512", "--data.mock", "true")
    plan = _run(program, "plan", *run, cwd=tmp_path)
    assert "KV cache" in plan
    imported = (
        "import lckv.models; from transformers import AutoConfig; print(AutoConfig.for_model('lckv-llama'))"
    )
    assert "LCKVLlamaConfig" in _run(str(environment / "bin/python"), "-c", imported, cwd=tmp_path)


def test_versions_agree(environment: Path, tmp_path: Path) -> None:
    shown = _run(str(environment / "bin" / "lckv-megatron"), "--version", cwd=tmp_path).split()
    (installed,) = importlib.metadata.distributions(
        path=[str(next(environment.glob("lib/python*/site-packages")))]
    )
    assert shown == ["lckv-megatron", installed.version]

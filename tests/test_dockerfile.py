"""The Dockerfile: by a linter, and against what the launchers take. CI runs the commands of its CPU stage
(.ci/docker_cpu_stage)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stage(name: str) -> str:
    return re.search(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM|\Z)", TEXT, re.M | re.S)[1]


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (the extra dev brings it on Linux)")
    done = subprocess.run(
        [linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_the_one_that_the_launcher_takes() -> None:
    tag = re.search(r"^ARG NGC_PYTORCH=(\S+)$", TEXT, re.M)[1]
    for file in ("launch_on_slurm.sh", "README.md"):
        named = re.findall(
            r"nvidia/pytorch:(\S+?)[} \n]", (ROOT / "examples" / file).read_text(encoding="utf-8")
        )
        assert set(named) == {tag}


def test_what_hurts_is_unset_before_anything_is_installed() -> None:
    gpu = stage("gpu")
    assert gpu.index("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0") < gpu.index("pip install")
    assert gpu.index('PIP_CONSTRAINT=""') < gpu.index("pip install")


def test_commands_of_the_cpu_stage_are_single_lines() -> None:
    """As .ci/docker_cpu_stage reads them."""
    commands = re.findall(r"^RUN .*$", stage("cpu"), re.M)
    assert len(commands) == 3
    assert not [command for command in commands if command.endswith("\\")]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_image_ends_with_a_look_at_itself(name: str) -> None:
    assert stage(name).rstrip().splitlines()[-1] == "RUN lckv-megatron doctor"


def test_the_images_own_packages_are_kept() -> None:
    """The pattern over what pip lists in such an image."""
    pattern = re.search(r"grep -iE '(.*?)'", stage("gpu"))[1]
    listed = ["torch==2.10.0a0+b4e4ee81d3", "transformer_engine==2.10.0", "flash_attn==2.7.4", "apex==0.1"]
    listed += [
        "pytorch-triton==3.5.0",
        "triton==3.5.1",
        "numpy==2.1.0",
        "torchvision==0.25",
        "torch-tensorrt==2.9",
    ]
    kept = [line for line in listed if re.search(pattern, line, re.I)]
    assert kept == listed[:7]

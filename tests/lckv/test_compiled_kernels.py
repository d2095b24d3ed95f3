"""All Triton kernels, as the project launches them, compiled for NVIDIA GPUs where there is none."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lckv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 2**10, 90: 227 * 2**10}
"""What a card gives to one program, by compute capability: A100, H100."""
GUARANTEED = 99 * 2**10
"""What every card from Ampere on gives."""


@pytest.fixture(scope="module", params=[90, pytest.param(80, marks=pytest.mark.nightly)])
def capability(request: pytest.FixtureRequest) -> int:
    """A card."""
    return int(request.param)


@pytest.fixture(scope="module")
def compiled(capability: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One entry for each case and kernel."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.lckv.compiled_kernels", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]], capability: int) -> None:
    made = {(one["kernel"], one["capability"]) for one in compiled}
    assert made == {(kernel, capability) for kernel in launched_kernels()}
    assert all(one["bytes"] > 0 for one in compiled)


def test_shared_memory_is_within_the_limit_of_the_card(compiled: list[dict[str, Any]]) -> None:
    too_large = [one for one in compiled if one["shared"] > min(SHARED_BYTES[one["capability"]], GUARANTEED)]
    assert too_large == []
    assert max(one["shared"] for one in compiled) > 64 * 2**10, "large cases are among them"


def launched_kernels() -> set[str]:
    """Names of what stands before [grid](...) in the packages."""
    names = set()
    for path in Path(lckv.__file__).parent.rglob("kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                names.add(ast.unparse(node.func.value))
    return names

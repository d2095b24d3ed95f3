"""Settings of the whole suite: the same on a machine with and without GPUs, deterministic, and without
network."""

import functools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.ranks import HIDDEN_GPUS_VARIABLE

# Before anything initialises CUDA: the suite tests the CPU path on every machine. Tests marked gpu run their
# code in processes of their own, `run_on_ranks(..., device="cuda")`, which see the GPUs again.
if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        os.environ[HIDDEN_GPUS_VARIABLE] = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _GPUS_ALLOWED = True
else:
    _GPUS_ALLOWED = HIDDEN_GPUS_VARIABLE in os.environ

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and several processes share the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers warns in every forked process
os.environ.setdefault("MPLBACKEND", "Agg")

# A KV policy that exists only in the tests, for every process that they start.
os.environ["LCKV_POLICIES"] = "tests.policies.forgetful"
_ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))

# The same examples everywhere, so that a failure can be repeated; HYPOTHESIS_PROFILE=explore looks for new
# ones.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def _log_of_a_test_ends_with_it() -> Iterator[None]:
    """A program that a test calls logs to the standard error of that test, which is closed afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if handler not in before and type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.setLevel(level)


@functools.cache
def _number_of_gpus() -> int:
    if not _GPUS_ALLOWED or shutil.which("nvidia-smi") is None:
        return 0
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get(HIDDEN_GPUS_VARIABLE, "")}
    if HIDDEN_GPUS_VARIABLE not in os.environ:
        del environment["CUDA_VISIBLE_DEVICES"]
    count = "import torch; print(torch.cuda.device_count())"
    result = subprocess.run(
        [sys.executable, "-c", count], env=environment, capture_output=True, text=True, timeout=120
    )
    return int(result.stdout) if result.returncode == 0 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu(count) where there are fewer GPUs, saying so."""
    for item in items:
        for marker in item.iter_markers("gpu"):
            needed = marker.args[0] if marker.args else marker.kwargs.get("count", 1)
            if _number_of_gpus() < needed:
                reason = f"needs {needed} NVIDIA GPU(s), found {_number_of_gpus()}"
                item.add_marker(pytest.mark.skip(reason=reason))

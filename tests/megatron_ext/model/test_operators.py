"""Which operators are chosen and why; liger-kernel's through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lckv.errors import UnsupportedError
from lckv.rope import turned
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model import operators
from megatron_ext.model.operators import Choice, Operators, choose, choose_operators, liger_norm, liger_swiglu
from tests.pinned_sources import LIGER_KERNEL, folder_of

ROOT = Path(__file__).parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_LIGER = "the package liger-kernel is not installed"


def named(chosen: Operators) -> tuple[str, str, str]:
    return chosen.rms_norm.name, chosen.swiglu.name, chosen.rope.name


class Kernel:
    """In the place of liger-kernel's functions."""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return arguments


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "why_no_function", lambda *wanted: None)
    monkeypatch.setattr(operators, "_loaded", lambda *wanted: Kernel)


@pytest.fixture
def _without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "why_no_function", lambda *wanted: NO_LIGER)


def test_on_a_cpu_everything_is_pytorchs() -> None:
    reason = "asked for auto: Triton's kernels need CUDA tensors, the model is on cpu"
    chosen = choose_operators(ModelConfig(), ParallelConfig(), device=CPU)
    for choice in (chosen.rms_norm, chosen.swiglu, chosen.rope):
        assert (choice.name, choice.reason) == ("torch", reason)
    assert chosen.rope.function is turned


@pytest.mark.usefixtures("_installed")
def test_on_a_gpu_each_is_a_kernel() -> None:
    pytest.importorskip("triton")
    from lckv.kernels import rope

    for name in ("auto", "triton"):
        chosen = choose(name, device=CUDA, widest=65_536)
        assert named(chosen) == ("liger", "liger", "triton")
        assert chosen.rope == Choice("triton", f"asked for {name}", rope.turned)
    assert named(choose("torch", device=CUDA, widest=64)) == ("torch", "megatron", "torch")


@pytest.mark.usefixtures("_without_liger")
def test_without_liger_rope_is_still_a_kernel() -> None:
    pytest.importorskip("triton")
    chosen = choose("auto", device=CUDA, widest=64)
    assert named(chosen) == ("torch", "megatron", "triton")
    assert chosen.swiglu.reason == chosen.rms_norm.reason == f"asked for auto: {NO_LIGER}"


def test_without_triton_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators.importlib.util, "find_spec", lambda name: None)
    chosen = choose("auto", device=CUDA, widest=64)
    assert named(chosen) == ("torch", "megatron", "torch")
    assert chosen.rope.reason == "asked for auto: the package triton is not installed"


@pytest.mark.usefixtures("_without_liger")
@pytest.mark.parametrize(
    ("name", "device", "widest", "obstacle"),
    [
        ("triton", CPU, 64, "Triton's kernels need CUDA tensors, the model is on cpu"),
        ("triton", CUDA, 64, NO_LIGER),
        ("triton", CUDA, 65_537, "liger-kernel takes rows of at most 65,536 channels, not 65,537"),
        ("apex", CUDA, 64, "the backends are auto, torch, triton"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    name: str, device: torch.device, widest: int, obstacle: str
) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedError, match=obstacle):
        choose(name, device=device, widest=widest)


@pytest.mark.usefixtures("_installed")
def test_the_widest_row_of_a_rank_counts() -> None:
    pytest.importorskip("triton")
    model = ModelConfig(hidden_size=256, ffn_hidden_size=100_000, operator_backend="triton")
    split = ParallelConfig(tensor_model_parallel_size=2)
    assert choose_operators(model, split, device=CUDA).swiglu.name == "liger"
    message = (
        "model.operator_backend is triton, but liger-kernel takes rows of at most 65,536 channels, not "
        "100,000. Set model.operator_backend to auto or torch."
    )
    with pytest.raises(ConfigError, match=message):
        choose_operators(model, ParallelConfig(), device=CUDA)


def test_how_liger_is_called() -> None:
    """In float32 to the end as PyTorch's norm, and without writing over what arrives."""
    states, weight = torch.ones(3, 2, 8), torch.ones(8)
    assert liger_norm(states, weight, 1e-5, kernel=Kernel)[2:] == (1e-5, 0.0, "gemma", False)
    seen = []

    class Seen:
        @staticmethod
        def apply(y: torch.Tensor, in_place: bool) -> torch.Tensor:
            seen.append((y.shape, in_place))
            return y[:, :4]

    assert liger_swiglu(states, kernel=Seen).shape == (3, 2, 4)
    assert seen == [((6, 8), False)]  # for more dimensions its gradient has another shape


def test_pytorchs_operations() -> None:
    chosen = choose("torch", device=CPU, widest=8)
    states, weight = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True), torch.randn(8).double()
    gate, linear = states.chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * linear
    torch.testing.assert_close(chosen.swiglu.function(states), expected)
    normed = states * (states.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    torch.testing.assert_close(chosen.rms_norm.function(states, weight, 1e-3), normed)


def test_what_a_gpu_compiles_is_the_same() -> None:
    """Megatron's function, here as it is."""
    on_gpu = choose("torch", device=CUDA, widest=8).swiglu.function
    states = torch.randn(3, 2, 8)
    with torch.compiler.set_stance("force_eager"):
        found = on_gpu(states)
    torch.testing.assert_close(found, choose("torch", device=CPU, widest=8).swiglu.function(states))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1"}
    paths = os.pathsep.join(map(str, (ROOT, folder_of(LIGER_KERNEL))))
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    cases = str(Path(__file__).with_name("interpreted_operators.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout

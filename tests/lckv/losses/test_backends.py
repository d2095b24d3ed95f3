"""How a backend of the loss is chosen, and those of other packages with stand-ins of their functions, whose
signatures `tests/test_signatures.py` compares."""

import importlib.util
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.errors import UnsupportedError
from lckv.losses import backends, cut, liger
from lckv.losses.backends import LossTerms, choose, why_no_package
from lckv.losses.cut import cut_cross_entropy
from lckv.losses.liger import chunk_loss
from tests.lckv.losses.test_linear_cross_entropy import EXACT, PADDED, Problem, assert_close, oracle
from tests.ranks import run_on_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


class Liger(torch.autograd.Function):
    """What liger-kernel's function does, on one rank."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: None, ignored: int, smoothing: float, *ways: str
    ) -> Tensor:
        assert (group, smoothing, logits.dim()) == (None, 0.0, 3)
        logprobs = logits.log_softmax(-1)
        counted = target != ignored
        place = target.clamp(min=0)[..., None]
        ctx.save_for_backward(logprobs, place, counted)
        return -logprobs.gather(-1, place)[..., 0] * counted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, place, counted = ctx.saved_tensors
        own = logprobs.exp().scatter_add(-1, place, torch.full_like(place, -1, dtype=logprobs.dtype))
        return own * (gradient * counted)[..., None], *[None] * 6


def cut_kernel(
    e: Tensor, c: Tensor, targets: Tensor, *, ignore_index: int, softcap: float | None, reduction: str,
    filter_eps: float | str | None, impl: str,
) -> Tensor:  # fmt: skip
    """What cut-cross-entropy's function gives."""
    assert (reduction, impl) == ("none", "cce")
    assert filter_eps in (None, "auto")
    logits = e @ c.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index)


@pytest.mark.parametrize("chunk", [3, 100])
def test_liger_between_the_products(chunk: int) -> None:
    problem, kernel = Problem(), partial(chunk_loss, kernel=Liger)
    assert_close(problem.results(chunk_size=chunk, kernel=kernel), oracle(problem), **EXACT)
    with torch.no_grad():
        losses = problem.loss(kernel=kernel).losses
    torch.testing.assert_close(losses, oracle(problem)[0])


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("filtered", [False, True])
def test_cut_cross_entropy(soft_cap: float | None, filtered: bool) -> None:
    problem = Problem()
    done = cut_cross_entropy(
        problem.states,
        problem.weight,
        problem.targets,
        token_weights=problem.token_weights,
        vocabulary=PADDED,
        soft_cap=soft_cap,
        filtered=filtered,
        kernel=cut_kernel,
    )
    gradients = torch.autograd.grad(done.total, (problem.states, problem.weight))
    ours = done.losses, done.total.detach(), *gradients
    assert_close(ours, oracle(problem, soft_cap=soft_cap), **EXACT)
    assert not done.losses.requires_grad


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages."""
    loaded = {
        liger.MODULE: SimpleNamespace(**{liger.FUNCTION: Liger}),
        cut.MODULE: SimpleNamespace(**{cut.FUNCTION: cut_kernel}),
    }
    monkeypatch.setattr(backends, "why_no_package", lambda distribution: None)
    monkeypatch.setattr(backends.importlib, "import_module", loaded.__getitem__)


@pytest.mark.usefixtures("_installed")
def test_auto_takes_liger_where_it_serves() -> None:
    chosen = choose("auto", device=CUDA, dtype=BF16, ranks=4)
    assert (chosen.name, chosen.reason) == ("liger", "asked for auto")
    assert choose("auto", device=CUDA, dtype=BF16, terms=LossTerms(z_loss=1e-4)).name == "chunked"
    assert choose("auto", device=CPU, dtype=BF16).name == "chunked"
    problem = Problem()
    done = chosen.loss(problem.states, problem.weight, problem.targets, vocabulary=PADDED)
    torch.testing.assert_close(done.losses, oracle(problem)[0])


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(("name", "filtered"), [("cut", False), ("cut_filtered", True)])
def test_cut_is_taken_where_it_is_asked_for(name: str, filtered: bool) -> None:
    chosen = choose(name, device=CUDA, dtype=BF16, terms=LossTerms(soft_cap=30.0))
    assert (chosen.name, chosen.adds_weight_gradient) == (name, False)
    assert isinstance(chosen.loss, partial)
    assert (chosen.loss.keywords["filtered"], chosen.loss.keywords["soft_cap"]) == (filtered, 30.0)


def test_auto_says_why_not_liger() -> None:
    chosen = choose("auto", device=CPU, dtype=BF16)
    assert chosen.reason == "asked for auto: liger-kernel needs CUDA tensors, the model is on cpu"


@pytest.mark.parametrize(
    ("name", "options", "obstacle"),
    [
        ("liger", {"terms": LossTerms(z_loss=1e-4)}, "liger-kernel has neither z-loss nor soft-cap"),
        ("liger", {"terms": LossTerms(soft_cap=30.0)}, "liger-kernel has neither z-loss nor soft-cap"),
        ("liger", {"device": CPU}, "liger-kernel needs CUDA tensors, the model is on cpu"),
        ("cut", {"ranks": 2}, "needs the whole vocabulary on a rank, and 2 ranks share it"),
        ("cut", {"terms": LossTerms(z_loss=1e-4)}, "cut-cross-entropy has no z-loss"),
        ("cut_filtered", {"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
        ("cut", {"chunk_size": 64}, "tiles of its own, and chunks of 64 tokens are asked for"),
        ("cut_filtered", {"device": CPU}, "cut-cross-entropy needs CUDA tensors, the model is on cpu"),
        ("whole", {}, "the backends are auto, chunked, liger, cut, cut_filtered"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    name: str, options: dict[str, Any], obstacle: str
) -> None:
    with pytest.raises(UnsupportedError, match=obstacle):
        choose(name, **{"device": CUDA, "dtype": BF16, **options})


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """What is known of packages."""
    why_no_package.cache_clear()
    yield
    why_no_package.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "the package liger-kernel is not installed (pip install" in str(why_no_package("liger-kernel"))


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ModuleNotFoundError("no", name=liger.MODULE), f"has no {liger.MODULE}, which 0.8.1 and newer has"),
        (SimpleNamespace(), f"has no {liger.MODULE}.{liger.FUNCTION}, which 0.8.1 and newer has"),
        (ModuleNotFoundError("no triton", name="triton"), "liger-kernel cannot be imported: no triton"),
        (OSError("no driver"), "liger-kernel cannot be imported: no driver"),
    ],
)
def test_a_package_that_does_not_serve(answer: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends.importlib, "import_module", load)
    assert said in str(why_no_package("liger-kernel"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chunked", "liger", "cut", "cut_filtered"])
def test_on_a_gpu(name: str) -> None:
    """With the packages themselves, where they are installed; bfloat16."""
    package = {"liger": "liger_kernel", "cut": cut.MODULE, "cut_filtered": cut.MODULE}.get(name, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run_on_ranks(1, compare_on_gpu, name, device="cuda")


def compare_on_gpu(name: str) -> None:
    problem = Problem(BF16, tokens=300, hidden=128, true=1000, rows=1024)
    expected = oracle(problem)
    for field in ("states", "weight"):
        setattr(problem, field, getattr(problem, field).detach().cuda().requires_grad_())
    chosen = choose(name, device=CUDA, dtype=BF16, chunk_size=0 if "cut" in name else 128)
    done = chosen.loss(
        problem.states,
        problem.weight,
        problem.targets.cuda(),
        token_weights=problem.token_weights.cuda(),
        vocabulary=problem.vocabulary,
    )
    gradients = torch.autograd.grad(done.total, (problem.states, problem.weight))
    ours = [tensor.cpu() for tensor in (done.losses, done.total.detach(), *gradients)]
    assert_close(tuple(ours[:2]), expected[:2], rtol=1e-3, atol=1e-3)
    for one, other in zip(ours[2:], expected[2:], strict=True):  # rounded to bfloat16 before the products
        assert (one.double() - other).abs().max() < 0.02 * other.abs().max()

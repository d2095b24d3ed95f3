"""The loss from hidden states and the output weight, chunk by chunk: against the plain formula in float64, on
one rank and on several that share the vocabulary; what it keeps in memory, and how often it multiplies."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lckv.losses import products
from lckv.losses.linear_cross_entropy import linear_cross_entropy
from lckv.losses.token_losses import TokenLosses, Vocabulary
from tests.ranks import run_on_ranks

TOKENS, HIDDEN, TRUE, ROWS = 23, 8, 11, 16
"""Of the vocabulary TRUE tokens, and padding up to ROWS."""
PADDED = Vocabulary(TRUE)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}
"""Of float32, after sums over the vocabulary and over tokens."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "soft-cap": {"soft_cap": 2.0},
    "both": {"z_loss": 0.1, "soft_cap": 2.0},
}


class Problem:
    """States, a padded weight, targets of which every fifth is ignored, and weights, some of them 0."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        seed: int = 1,
        *,
        tokens: int = TOKENS,
        hidden: int = HIDDEN,
        true: int = TRUE,
        rows: int = ROWS,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary = Vocabulary(true)
        self.states = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
        self.targets = torch.randint(true, (tokens,), generator=generator)
        self.targets[::5] = -100
        self.token_weights = torch.rand(tokens, generator=generator, dtype=torch.float64).to(
            products.wide_dtype(dtype)
        )
        self.token_weights[1::7] = 0

    def loss(self, **options: Any) -> TokenLosses:
        options = {"vocabulary": PADDED, "token_weights": self.token_weights, **options}
        return linear_cross_entropy(self.states, self.weight, self.targets, **options)

    def results(self, scale: float = 1.0, **options: Any) -> tuple[Tensor, ...]:
        """Losses, total, and gradients of states and weight where the total counts `scale` times."""
        done = self.loss(**options)
        inputs = self.states, self.weight
        gradients = torch.autograd.grad(done.total, inputs, torch.full_like(done.total, scale))
        return done.losses, done.total.detach(), *gradients


def oracle(
    problem: Problem, *, z_loss: float = 0.0, soft_cap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """`Problem.results` by the formula, in float64."""
    states = problem.states.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    logits = states @ weight[: problem.vocabulary.size].t()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    counted = problem.targets >= 0
    losses = torch.nn.functional.cross_entropy(logits, problem.targets, reduction="none", ignore_index=-100)
    penalty = z_loss * logits.logsumexp(1) ** 2 * counted
    total = (problem.token_weights * (losses + penalty)).sum()
    gradients = torch.autograd.grad(total * scale, (states, weight))
    return losses.detach(), total.detach(), *gradients


def assert_close(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
@given(chunk=st.integers(1, TOKENS + 3), seed=st.integers(0, 5))
def test_any_chunks_give_the_formula(name: str, chunk: int, seed: int) -> None:
    problem, options = Problem(seed=seed), OPTIONS[name]
    assert_close(problem.results(chunk_size=chunk, **options), oracle(problem, **options), **EXACT)


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_is_within_its_rounding(name: str) -> None:
    problem = Problem(torch.float32)
    ours = problem.results(chunk_size=5, **OPTIONS[name])
    assert {tensor.dtype for tensor in ours} == {torch.float32}
    assert_close(ours, oracle(problem, **OPTIONS[name]), **ROUNDING)


@pytest.mark.parametrize("name", OPTIONS)
def test_sums_of_bfloat16_are_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of the same numbers to float32's rounding; only the gradients are rounded at the end.
    The weight is made wide three rows at a time."""
    monkeypatch.setattr(products, "_BLOCK_NUMBERS", 3 * HIDDEN)
    problem = Problem(torch.bfloat16)
    sums = torch.zeros(ROWS, HIDDEN)
    losses, total, of_states, of_weight = problem.results(chunk_size=5, **OPTIONS[name])
    expected = oracle(problem, **OPTIONS[name])
    assert_close((losses, total), expected[:2], **ROUNDING)
    assert (of_states.dtype, of_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert_close((of_states, of_weight), expected[2:], rtol=2**-8, atol=1e-6)
    problem.loss(chunk_size=5, weight_gradient=sums, **OPTIONS[name]).total.backward()
    assert_close((sums,), expected[3:], **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_gradient_of_the_total_scales(dtype: torch.dtype) -> None:
    """float16: gradients of a mean over many tokens are below its smallest number before they are scaled."""
    problem = Problem(dtype)
    problem.token_weights *= 1e-6
    expected = oracle(problem, scale=2.0**15)
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 2e-3, "atol": 1e-7}
    assert_close(problem.results(scale=2.0**15, chunk_size=4)[2:], expected[2:], **tolerance)


def test_ignored_tokens_and_padding_get_nothing() -> None:
    problem = Problem()
    with torch.no_grad():
        problem.weight[TRUE:] = 100.0  # would win every token
    losses, _, of_states, of_weight = problem.results(chunk_size=4)
    assert losses[::5].eq(0).all()
    assert of_states[::5].eq(0).all()
    assert of_weight[TRUE:].eq(0).all()
    assert_close((losses, of_states), (oracle(problem)[0], oracle(problem)[2]), **EXACT)


def test_token_weights_of_nought_leave_the_loss_and_take_the_gradient() -> None:
    problem = Problem()
    problem.token_weights[:] = 0
    losses, total, *gradients = problem.results()
    torch.testing.assert_close(losses, oracle(problem)[0])
    assert total == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_without_weights_every_token_counts_once() -> None:
    problem = Problem()
    done = linear_cross_entropy(problem.states, problem.weight[:TRUE], problem.targets)
    torch.testing.assert_close(done.total, done.losses.sum())


def test_logits_may_be_huge() -> None:
    problem = Problem(torch.float32)
    with torch.no_grad():
        problem.states.mul_(1e4)
    assert_close(problem.results(chunk_size=6), oracle(problem), rtol=1e-4, atol=1e-1)


def test_what_is_not_wanted_is_not_made() -> None:
    problem = Problem()
    problem.weight.requires_grad_(False)
    with Operations() as seen:
        problem.loss(chunk_size=6).total.backward()
    assert seen.products == {"mm": 8}
    torch.testing.assert_close(problem.states.grad, oracle(problem)[2])
    with torch.no_grad(), Operations() as seen:
        done = problem.loss(chunk_size=6)
    assert seen.products == {"mm": 4}
    assert not done.total.requires_grad
    torch.testing.assert_close(done.losses, oracle(problem)[0])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("into_sums", [False, True])
def test_three_products_a_chunk_and_no_logits_of_all_tokens(name: str, into_sums: bool) -> None:
    problem, chunk = Problem(torch.float32), 4
    sums = torch.zeros(ROWS, HIDDEN) if into_sums else None
    with Operations() as seen:
        problem.loss(chunk_size=chunk, weight_gradient=sums, **OPTIONS[name]).total.backward()
    assert seen.products == {"mm": 2 * -(-TOKENS // chunk), "addmm": -(-TOKENS // chunk)}
    assert seen.largest == max(TOKENS * HIDDEN, ROWS * HIDDEN * (not into_sums))
    assert seen.largest < TOKENS * ROWS


class Operations(TorchDispatchMode):
    """Counts matrix products, and looks for the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        self.products.update([name] if name in ("mm", "addmm", "bmm", "baddbmm") else [])
        if isinstance(output, Tensor) and function._schema.returns[0].alias_info is None:
            self.largest = max(self.largest, output.numel())
        return output


def test_sums_are_added_to_at_once_and_autograd_gets_nothing() -> None:
    problem = Problem()
    before = torch.ones(ROWS, HIDDEN, dtype=torch.float64)
    sums = before.clone()
    for _ in range(2):
        problem.loss(chunk_size=5, weight_gradient=sums).total.backward()
    assert problem.weight.grad is None
    torch.testing.assert_close(sums, before + 2 * oracle(problem)[3])
    torch.testing.assert_close(problem.states.grad, 2 * oracle(problem)[2])


def test_sums_want_a_total_that_counts_once() -> None:
    problem = Problem()
    total = problem.loss(weight_gradient=torch.zeros(ROWS, HIDDEN, dtype=torch.float64)).total
    with pytest.raises(RuntimeError, match="added for a total of gradient 1"):
        (total / 2).backward()


def test_a_target_beyond_the_vocabulary_is_an_error() -> None:
    problem = Problem()
    problem.targets[3] = TRUE
    with pytest.raises(RuntimeError, match="a target is beyond the vocabulary"):
        problem.loss()


def test_gradients_are_given_once() -> None:
    """They are scaled where they lie."""
    total = Problem().loss().total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_autocast_means_its_dtype() -> None:
    problem = Problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = problem.results(chunk_size=6)
    rounded = Problem(torch.float32)
    with torch.no_grad():
        rounded.states.copy_(rounded.states.bfloat16())
        rounded.weight.copy_(rounded.weight.bfloat16())
    expected = oracle(rounded)
    assert_close(ours[:2], expected[:2], **ROUNDING)
    assert_close(ours[2:], expected[2:], rtol=2**-8, atol=1e-6)
    assert ours[3].dtype == torch.float32


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_vocabulary_agree_with_one(ranks: int) -> None:
    """Of four the last has nothing but padding. One collective a chunk."""
    answers = run_on_ranks(ranks, of_shares)
    for name, options in OPTIONS.items():
        problem = Problem()
        losses, total, of_states, of_weight = oracle(problem, **options)
        shares = [answer[name] for answer in answers]
        for share in shares:
            assert_close(share[:2], (losses, total), **EXACT)
            assert share[4] == 3
        assert_close((sum(share[2] for share in shares),), (of_states,), **EXACT)
        assert_close((torch.cat([share[3] for share in shares]),), (of_weight,), **EXACT)


def of_shares() -> dict[str, tuple[Any, ...]]:
    """On every rank: results with its rows, by options, and how many collectives they took."""
    group, found = dist.group.WORLD, {}
    assert group is not None
    for name, options in OPTIONS.items():
        problem, rows = Problem(), ROWS // group.size()
        first = rows * group.rank()
        problem.weight = problem.weight.detach()[first : first + rows].requires_grad_()
        with Collectives() as seen:
            results = problem.results(chunk_size=8, vocabulary=Vocabulary(TRUE, first, group), **options)
        found[name] = (*results, seen.number)
    return found


class Collectives(TorchDispatchMode):
    """Counts collectives."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))

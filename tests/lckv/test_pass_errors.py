"""Errors between passes: against numbers computed plainly, and who reports them."""

import numpy as np
import pytest
import torch

from lckv.config import CompressionConfig
from lckv.pass_errors import PassErrors, PassRecord, relative_error, reporter_of, reporting_layers
from lckv.policies.dmc.config import DMCConfig

GUESS = CompressionConfig(layer_types="0_2_2_3", first_guess=True, first_guess_loss_coefficient=0.5)
BOTH = CompressionConfig(layer_types="0_2_2_3", first_guess=True, agreement_loss_coefficient=0.25)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 5, 3, 2, 4, generator=generator)
    return key.requires_grad_(), value.requires_grad_()


def plainly(estimate, target, counted) -> np.ndarray:
    """[b, g], in float64."""
    errors = np.zeros((3, 2))
    for mine, right in zip(estimate, target, strict=True):
        mine, right = (tensor.detach().double().numpy() for tensor in (mine, right))
        for row in range(3):
            for head in range(2):
                tokens = [token for token in range(5) if counted[token][row]]
                wrong = sum(((mine - right)[token, row, head] ** 2).sum() for token in tokens)
                errors[row, head] += wrong / sum((right[token, row, head] ** 2).sum() for token in tokens) / 2
    return errors


def test_relative_error() -> None:
    counted = torch.ones(5, 3, dtype=torch.bool)
    counted[3:, 1] = False
    found = relative_error(pair(1), pair(2), counted)
    np.testing.assert_allclose(found.detach(), plainly(pair(1), pair(2), counted), rtol=1e-5)
    zeros = tuple(torch.zeros_like(tensor) for tensor in pair(2))
    assert torch.equal(relative_error(zeros, pair(2)), torch.ones(3, 2))
    nothing = torch.zeros(5, 3, dtype=torch.bool)
    assert torch.equal(relative_error(pair(1), pair(2), nothing), torch.zeros(3, 2))


def test_the_guess_is_pulled_to_the_last_pass_and_not_the_other_way_round() -> None:
    record, guess, before, last = PassRecord(PassErrors(BOTH), (2,)), pair(1), pair(2), pair(3)
    read = record.guessed(2, guess)
    assert not any(tensor.requires_grad for tensor in read)
    record.passed(2, before)
    record.passed(1, pair(4))
    of_guess, of_passes = record.statistics(2, last)
    tensors = (*guess, *before, *last)
    gradients = torch.autograd.grad(of_guess.sum(), tensors, retain_graph=True, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True] * 2 + [False] * 4
    gradients = torch.autograd.grad(of_passes.sum(), tensors, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [False] * 2 + [True] * 4
    assert record.statistics(1, last) == ()


def test_a_single_pass_has_nothing_to_compare() -> None:
    assert PassRecord(PassErrors(BOTH), (2,)).statistics(2, pair(1)) == ()


def test_losses_are_weighted() -> None:
    reporter = reporter_of(BOTH)
    loss = reporter.auxiliary_loss([torch.tensor([2.0, 1.0]), torch.tensor([4.0, 0.0])], 0.5)
    assert loss is not None
    assert loss.tolist() == pytest.approx([0.1 * 2 + 0.25 * 4, 0.1])
    means = [torch.tensor([[0.5, 0.25]]).double(), torch.tensor([[2.0, 4.0]]).double()]
    assert reporter.report(means, 0.0, None) == {"first_guess_error": 0.375, "pass_disagreement": 3.0}


def test_who_reports() -> None:
    assert [statistic.name for statistic in reporter_of(GUESS).statistics] == ["first_guess_error"]
    assert reporting_layers(GUESS, 4) == (2,)
    merging = CompressionConfig(layer_types="0_2_2_3", policy=DMCConfig(stage="finetune"))
    assert [statistic.name for statistic in reporter_of(merging).statistics] == ["merge_rate"]
    assert reporting_layers(merging, 4) == (0, 2, 3)
    assert reporter_of(CompressionConfig()).statistics == ()


NOT_CYCLIC = (
    "first_guess is True; no layer of 0_0 reads a layer above itself, so that nothing is iterated: leave "
    "it out, or choose a map with cyclic layers."
)
DROPS_TOKENS = (
    "first_guess is True; the policy dmc does not keep every token, and what it decides cannot be guessed "
    "or compared as numbers: leave one of them out."
)
ONE_PASS = (
    "agreement_loss_coefficient is 0.1; there is one pass, so that none is before the last: raise "
    "forward_passes or backward_passes, or set it to 0."
)
NO_GUESS = (
    "first_guess_loss_coefficient is 0.5; there is no first guess, whose error it weighs: leave it at 0.1, "
    "or set first_guess to true."
)
NEGATIVE = "first_guess_loss_coefficient is -1.0; it must be at least 0, and finite."
MERGING = DMCConfig(stage="finetune")
PROBLEMS = [
    (CompressionConfig(layer_types="0_0", first_guess=True), NOT_CYCLIC),
    (CompressionConfig(layer_types="1_1", first_guess=True, policy=MERGING), DROPS_TOKENS),
    (CompressionConfig(layer_types="1_1", first_guess_loss_coefficient=-1.0), NEGATIVE),
    (CompressionConfig(layer_types="1_1", first_guess_loss_coefficient=0.5), NO_GUESS),
    (CompressionConfig("1_1", forward_passes=0, backward_passes=1, agreement_loss_coefficient=0.1), ONE_PASS),
]


@pytest.mark.parametrize(("compression", "said"), PROBLEMS)
def test_what_cannot_work(compression: CompressionConfig, said: str) -> None:
    assert [str(problem) for problem in compression.problems(2)] == [said]

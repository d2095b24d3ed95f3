"""The learned first guess and the agreement of passes in the training model: nothing depends on the layout,
and what they send their gradient to."""

import pytest
import torch
from torch import Tensor

from megatron_ext.model.initialization import global_parameters
from tests.megatron_ext.model.stages import GUESSING, draw_tokens, fill_guesses, make_stage, positions_of
from tests.megatron_ext.model.test_context_parallel import Case, require_the_same
from tests.ranks import run_on_ranks

CASES = [
    Case("guess", documents="documents", tp=2),
    Case("guess", documents="documents", cp=2),
    Case("guess", documents="documents", tp=2, sequence_parallel=True, recompute="full"),
    Case("guess alone", tp=2, sequence_parallel=True),
    Case("guess in two groups", documents="documents", pp=2, micro_batch_size=1),
    Case("agreement", documents="documents", cp=2, recompute="selective"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_depends_on_the_layout(case: Case) -> None:
    require_the_same(case)


@pytest.mark.parametrize("name", ["guess", "guess alone", "guess in two groups"])
def test_the_guess_is_trained_by_its_error_alone_and_sends_no_gradient_on(name: str) -> None:
    """The loss of tokens gives the guess none; the error gives only the guess one."""
    ((of_tokens, of_error),) = run_on_ranks(1, receivers, name)
    guesses = {f"decoder.layers.{layer}.self_attention.linear_first_guess.weight" for layer in _sources(name)}
    assert of_tokens.isdisjoint(guesses)
    assert of_error == guesses


def _sources(name: str) -> tuple[int, ...]:
    return GUESSING[name].map(6).cyclic_sources


def receivers(name: str) -> tuple[set[str], set[str]]:
    """The parameters that the loss of tokens, and the error of the guess, have a gradient for."""
    stage = make_stage(GUESSING[name])
    fill_guesses(stage)
    tokens = draw_tokens(2, 12)
    losses, report = stage(tokens, positions_of(tokens), tokens)
    parameters = dict(global_parameters(stage))
    # of the row sums: the guess's error, then the disagreement of passes
    wholes: list[Tensor] = [losses.total, report.sums[:, 0].sum()]
    received = []
    for whole in wholes:
        gradients = torch.autograd.grad(whole, [*parameters.values()], retain_graph=True, allow_unused=True)
        named = zip(parameters, gradients, strict=True)
        received.append({name for name, gradient in named if gradient is not None and gradient.any()})
    return received[0], received[1]

"""FP8 in all passes, or in those without gradient alone: which forwards are in it, when weights are quantised
anew, and that gradients add up."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine
from torch import Tensor

from lckv.config import CompressionConfig
from lckv.losses.token_losses import TokenLosses
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.model import fp8
from megatron_ext.model.build import build_stage
from megatron_ext.parallel.process_groups import initialize
from tests.megatron_ext.model.fp8_layers import Machine, fp8_machine
from tests.megatron_ext.model.stages import MODEL, VOCAB, draw_tokens, positions_of
from tests.ranks import run_on_ranks

PLANS = [(0, 1), (0, 2), (1, 1), (1, 2), (3, 2)]
"""(m, b)."""
MICRO_BATCHES = 2


def test_which_forwards_are_in_fp8_and_what_they_are_told() -> None:
    run_on_ranks(1, check_forwards)


def check_forwards() -> None:
    initialize(ParallelConfig(), seed=1)
    for plan in PLANS:
        for passes in ("all", "no_gradient"):
            with fp8_machine() as machine:
                train_twice(build(plan, passes), [])
                check_calls(machine, plan[0], passes)


def check_calls(machine: Machine, m: int, passes: str) -> None:
    calls = machine.calls
    without = [call for call in calls if not call.has_gradient]
    assert bool(without) == (m > 0)
    assert all(call.in_fp8 for call in without)
    others = [call for call in calls if call.has_gradient]
    assert all(call.in_fp8 == (passes == "all") and call.told is None for call in others)
    assert machine.contexts == ["hybrid"] * MICRO_BATCHES * (1 if passes == "all" else m)
    for layer in {call.layer for call in without}:
        told = [call.told for call in without if call.layer == layer]
        of_micro_batch = told[: len(told) // MICRO_BATCHES]
        assert of_micro_batch == [True] + [False] * (len(of_micro_batch) - 1)
        assert told == of_micro_batch * MICRO_BATCHES
    lengths = {len([call for call in without if call.layer == layer]) for layer in {c.layer for c in without}}
    assert m < 2 or lengths == {MICRO_BATCHES * m, MICRO_BATCHES * (m - 1)}, "pass 0 leaves out attention"


def test_numbers_and_gradients_are_those_of_weights_that_are_always_quantised_anew() -> None:
    (differences,) = run_on_ranks(1, compare_with_untold)
    assert max(differences.values()) == 0


def compare_with_untold() -> dict[tuple[Any, ...], float]:
    initialize(ParallelConfig(), seed=1)
    differences = {}
    for plan in PLANS:
        for passes in ("all", "no_gradient"):
            results = []
            for told in (True, False):
                with fp8_machine(), pytest.MonkeyPatch.context() as patch:
                    if not told:
                        patch.setattr(fp8, "_can_be_told", lambda module: False)
                    losses: list[Tensor] = []
                    gradients = train_twice(build(plan, passes), losses)
                    results.append([*losses, *gradients])
            pairs = zip(*results, strict=True)
            differences[plan, passes] = max((a - b).abs().max().item() for a, b in pairs)
    return differences


@pytest.mark.parametrize(("passes", "expected"), [("all", [1, 3, 3, 3, 1, 1]), ("no_gradient", [])])
def test_recomputed_passes_are_in_fp8_again(passes: str, expected: list[int]) -> None:
    assert run_on_ranks(1, count_arguments, passes) == [expected]


def count_arguments(passes: str) -> list[int]:
    """Of each layer that is recomputed through Transformer Engine: hidden states, and keys and values that it
    reads of another one."""
    initialize(ParallelConfig(), seed=1)
    counts: list[int] = []

    def te_checkpoint(function: Any, distribute: bool, generators: Any, group: Any, *arguments: Any) -> Any:
        assert not distribute
        assert group.size() == 1
        counts.append(len(arguments))
        return function(*arguments)

    with fp8_machine(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine, "te_checkpoint", te_checkpoint)
        losses_of(build((1, 1), passes, recompute_granularity="full"), 0)
    return counts


def build(plan: tuple[int, int], passes: str, **options: Any) -> torch.nn.Module:
    compression = CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=plan[0], backward_passes=plan[1]
    )
    model = replace(MODEL, fp8="hybrid", fp8_passes=passes)
    train = TrainConfig(precision="fp32", **options)
    stage = build_stage(model, compression, ParallelConfig(), train, vocab_size=VOCAB)
    return stage.train()


def losses_of(stage: torch.nn.Module, seed: int) -> TokenLosses:
    tokens = draw_tokens(2, 16, seed)
    losses, _ = stage(tokens, positions_of(tokens), tokens)
    return losses


def train_twice(stage: torch.nn.Module, losses: list[Tensor]) -> list[Tensor]:
    """Two micro-batches, between which the weights change: a kept weight of the first would be wrong in the
    second. Returns the gradients."""
    for parameter in stage.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    for seed in range(MICRO_BATCHES):
        done = losses_of(stage, seed)
        (done.total / done.losses.numel()).backward()
        losses.append(done.losses)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.mul_(1.25)
    return [
        parameter.main_grad + (0 if parameter.grad is None else parameter.grad)
        for parameter in stage.parameters()
    ]

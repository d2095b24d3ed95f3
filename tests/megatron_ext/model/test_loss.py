"""The model's loss without logits: against its own logits in float64, in every layout, and its gradients
through Megatron's data parallelism."""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from lckv.losses.backends import Choice
from lckv.losses.cut import cut_cross_entropy
from lckv.losses.token_losses import TokenLosses
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.evaluation.logits import compute_logits, compute_losses
from megatron_ext.model.build import wrap
from megatron_ext.model.gpt import SharedKVGPTModel
from tests.lckv.losses.test_backends import cut_kernel
from tests.megatron_ext.model.stages import EVERY_MAP, VOCAB, draw_tokens, make_stage, positions_of
from tests.ranks import run_on_ranks

Z_LOSS = 0.01


def mask_of(tokens: Tensor) -> Tensor:
    """Weights of tokens, some of them 0."""
    return torch.linspace(0, 2, tokens.numel()).view(tokens.shape).masked_fill(tokens % 5 == 0, 0)


def assert_within_rounding(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Of float32, relative to a tensor's largest number."""
    errors = {
        name: ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        for name, (ours, expected) in pairs.items()
    }
    assert {name: error for name, error in errors.items() if not error < 2e-5} == {}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_loss_and_gradients_are_those_of_the_logits(tied: bool, tp: int, sequence_parallel: bool) -> None:
    """Chunks of 5 tokens; padding of the vocabulary, of which the second rank has nothing else."""
    for answer in run_on_ranks(tp, compare_with_logits, tied, tp, sequence_parallel):
        assert_within_rounding(answer)


def compare_with_logits(tied: bool, tp: int, sequence_parallel: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """On every rank: losses, total and gradients by name, each without and with logits."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    stage = make_stage(
        EVERY_MAP["lckv"],
        parallel,
        untie_embeddings_and_output_weights=not tied,
        make_vocab_size_divisible_by=64,
        cross_entropy_chunk_size=5,
        cross_entropy_z_loss=Z_LOSS,
    )
    tokens = draw_tokens(3, 12)
    done, _ = stage(tokens, positions_of(tokens), tokens, loss_mask=mask_of(tokens))
    done.total.backward()
    found = {"losses": done.losses, "total": done.total.detach(), **take_gradients(stage)}
    losses, total = by_logits(stage, tokens)
    total.backward()
    expected = {"losses": losses.detach(), "total": total.detach(), **take_gradients(stage)}
    return {name: (found[name], expected[name]) for name in expected}


def by_logits(stage: SharedKVGPTModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and total by the formula, from the logits of all ranks."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    logits, _ = stage(tokens, positions_of(tokens))
    logits = gather_from_tensor_model_parallel_region(logits)[..., :VOCAB].double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return losses, ((losses + Z_LOSS * logits.logsumexp(-1) ** 2) * mask_of(tokens)).sum()


def take_gradients(stage: torch.nn.Module) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.grad = None
    return gradients


@pytest.mark.parametrize(
    ("layout", "tied"),
    [((1, 1), True), ((1, 1), False), ((1, 2), True), ((1, 2), False), ((2, 1), True)],
    ids=str,
)
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_the_sums_of_data_parallelism_get_every_gradient(
    layout: tuple[int, int], tied: bool, overlap: bool
) -> None:
    """Two micro-batches; the last stage's copy of a tied weight has its own sums, and a single stage's weight
    those of both ends."""
    tp, pp = layout
    for answer in run_on_ranks(tp * pp, sums_and_gradients, tp, pp, tied, overlap):
        assert_within_rounding(answer)


def sums_and_gradients(tp: int, pp: int, tied: bool, overlap: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """On every rank: of each parameter, the sums of data parallelism, and autograd's gradients without it."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=False,
    )
    train = TrainConfig(precision="fp32")
    found = []
    for data_parallel in (False, True):
        stage = make_stage(EVERY_MAP["yoco"], parallel, train, untie_embeddings_and_output_weights=not tied)
        model = wrap(stage, parallel, train) if data_parallel else stage
        for seed in range(2):
            step(stage, model, seed)
        if data_parallel and stage.post_process:
            weight = stage._output_weight()
            weight = stage.output_layer.weight if weight is None else weight
            assert weight.grad_added_to_main_grad
            assert weight.grad is None
        named = stage.named_parameters()
        found.append({name: (each.main_grad if data_parallel else each.grad) for name, each in named})
        parallel_state.destroy_model_parallel()
    plain, sums = found
    return {name: (sums[name], plain[name]) for name in plain}


def step(stage: SharedKVGPTModel, model: torch.nn.Module, seed: int) -> None:
    """Forward and backward of this stage alone, whose neighbours are made up."""
    tokens = draw_tokens(2, 10, seed)
    if not stage.pre_process:
        shape = stage.decoder.payload_in(stage.decoder.visit).shape(10, 2)
        arrived = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        stage.set_input_tensor(arrived.requires_grad_())
    output, _ = model(tokens, positions_of(tokens), tokens, loss_mask=mask_of(tokens))
    (output.total if isinstance(output, TokenLosses) else output.sum()).backward()


def test_a_backend_without_sums_goes_through_autograd() -> None:
    """Under data parallelism."""
    ((ours, expected),) = run_on_ranks(1, sums_by_cut_cross_entropy)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


def sums_by_cut_cross_entropy() -> tuple[Tensor, Tensor]:
    """Of the output weight; and those of the default backend."""
    train, sums = TrainConfig(precision="fp32"), []
    stage = make_stage(EVERY_MAP["plain"], train=train)
    model = wrap(stage, ParallelConfig(), train)
    cut = Choice("cut", "", partial(cut_cross_entropy, kernel=cut_kernel), adds_weight_gradient=False)
    for loss in (cut, stage.loss):
        stage.loss = loss
        model.zero_grad_buffer()
        step(stage, model, 0)
        sums.append(stage.output_layer.weight.main_grad.clone())
    return sums[0], sums[1]


def test_a_total_that_does_not_count_once_is_refused_under_data_parallelism() -> None:
    run_on_ranks(1, check_scaled_total)


def check_scaled_total() -> None:
    parallel, train = ParallelConfig(), TrainConfig(precision="fp32")
    model, tokens = wrap(make_stage(EVERY_MAP["plain"]), parallel, train), draw_tokens(1, 6)
    done, _ = model(tokens, positions_of(tokens), tokens)
    with pytest.raises(RuntimeError, match="added for a total of gradient 1"):
        (done.total / 2).backward()


@pytest.mark.parametrize("options", [{}, {"recompute_granularity": "full"}], ids=str)
def test_no_logits_of_all_tokens_are_in_memory(options: dict[str, Any]) -> None:
    (largest,) = run_on_ranks(1, largest_tensor, options)
    assert largest < ROWS * LENGTH * WIDE


ROWS, LENGTH, WIDE = 2, 24, 4096


def largest_tensor(options: dict[str, Any]) -> int:
    """Numbers of the largest tensor that a step makes, with the weights' gradients added to sums."""
    from tests.lckv.losses.test_linear_cross_entropy import Operations

    train = TrainConfig(precision="fp32", **options)
    stage = make_stage(
        EVERY_MAP["plain"], train=train, make_vocab_size_divisible_by=WIDE, cross_entropy_chunk_size=8
    )
    model, tokens = wrap(stage, ParallelConfig(), train), draw_tokens(ROWS, LENGTH)
    with Operations() as seen:
        model(tokens, positions_of(tokens), tokens)[0].total.backward()
    assert stage.padded_vocab_size == WIDE
    return seen.largest


def test_without_gradient_none_is_made() -> None:
    run_on_ranks(1, check_evaluation)


def check_evaluation() -> None:
    from tests.lckv.losses.test_linear_cross_entropy import Operations

    train = TrainConfig(precision="fp32")
    stage = make_stage(EVERY_MAP["plain"], train=train)
    model, tokens = wrap(stage, ParallelConfig(), train), draw_tokens(2, 8)
    with torch.no_grad(), Operations() as seen:
        done, _ = model(tokens, positions_of(tokens), tokens)
    assert seen.products["addmm"] == 0
    assert not done.total.requires_grad
    assert stage.output_layer.weight.main_grad.eq(0).all()


@pytest.mark.parametrize("name", ["plain", "lckv", "lckv x dmc"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_losses_of_given_tokens_are_those_of_their_logits(name: str, layout: tuple[int, int, int]) -> None:
    tp, pp, cp = layout
    answers = run_on_ranks(tp * pp * cp, losses_two_ways, name, *layout)
    assert any(answer is not None for answer in answers)
    for answer in answers:
        if answer is not None:
            torch.testing.assert_close(*answer, rtol=1e-5, atol=1e-5)


def losses_two_ways(name: str, tp: int, pp: int, cp: int) -> tuple[Tensor, Tensor] | None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    stage = make_stage(EVERY_MAP[name], parallel).eval()
    tokens, labels = draw_tokens(2, 11), draw_tokens(2, 11, seed=1)
    logits, losses = compute_logits(stage, tokens), compute_losses(stage, tokens, labels)
    if logits is None or losses is None:
        assert logits is losses
        return None
    return losses, torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

"""The optimizer's moments after a resume are those that were saved, tensor by tensor: in every layout that
may go on with a checkpoint, and without a silent loss where one may not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpointing.errors import MismatchError
from tests.megatron_ext.checkpointing import tiny_gpt
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks
from tests.thinning import thinned

Moments = dict[str, dict[str, torch.Tensor]]


def moments_of(run: Run) -> Moments:
    """First and second moments and main weights of the whole model, on every rank."""
    return {key: run.moments(key) for key in ("exp_avg", "exp_avg_sq", "main")}


def save(case: Case, directory: Path, sharding: str) -> Moments:
    run = Run(case)
    run.train(2)
    run.save(directory, 2, sharding=sharding)
    return moments_of(run)


def load(case: Case, directory: Path) -> tuple[Moments, Moments]:
    """Before and after loading, of a run that has other moments."""
    run = Run(case, seed=99)
    run.train(1)
    before = moments_of(run)
    run.load(directory)
    return before, moments_of(run)


WHOLE, PARTS = "fully_reshardable", "dp_reshardable"
OFF = {"distributed_optimizer": False}


@pytest.mark.parametrize(
    ("sharding", "saved", "saved_ranks", "loaded", "loaded_ranks"),
    thinned(
        [
            (WHOLE, Case(bf16=True), 1, Case(bf16=True), 2),
            (WHOLE, Case(bf16=True), 1, Case(bf16=True, tp=2), 2),
            (WHOLE, Case(bf16=True), 2, Case(bf16=True, pp=2), 2),
            (WHOLE, Case(bf16=True), 2, Case(bf16=True, overlap=True), 2),
            (WHOLE, Case(bf16=True, **OFF), 1, Case(bf16=True, **OFF), 2),
            (WHOLE, Case(bf16=True, **OFF), 1, Case(bf16=True, tp=2, **OFF), 2),
            (WHOLE, Case(bf16=True, tp=2, **OFF), 2, Case(bf16=True, pp=2, **OFF), 2),
            (PARTS, Case(bf16=True), 2, Case(bf16=True), 2),
            (PARTS, Case(), 2, Case(), 2),
            (PARTS, Case(overlap=True), 2, Case(overlap=True), 2),
            (PARTS, Case(bf16=True, tp=2), 2, Case(bf16=True, tp=2), 2),
            (PARTS, Case(bf16=True, pp=2), 2, Case(bf16=True, pp=2), 2),
        ],
        2,
    ),
    ids=str,
)
def test_moments_are_equal_after_a_resume(
    tmp_path: Path, sharding: str, saved: Case, saved_ranks: int, loaded: Case, loaded_ranks: int
) -> None:
    expected = run_on_ranks(saved_ranks, save, saved, tmp_path, sharding)[0]
    for before, after in run_on_ranks(loaded_ranks, load, loaded, tmp_path):
        for key, tensors in expected.items():
            assert after[key].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(after[key][name], tensor), f"{key} of {name}"
                assert tensor.any(), f"{key} of {name} shows nothing"
            assert not all(torch.equal(before[key][name], tensor) for name, tensor in tensors.items())


def refused(case: Case, directory: Path) -> tuple[str, bool]:
    """What loading into a model with other layers says, and whether it left the moments alone."""
    gpt = tiny_gpt.GPTModel

    def norms_last(*arguments: Any, **options: Any) -> torch.nn.Module:
        """As in Transformer Engine's layers, norms come later than in local ones; names are the same."""
        model = gpt(*arguments, **options)
        for layer in model.decoder.layers:
            layer._modules["input_layernorm"] = layer._modules.pop("input_layernorm")
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_gpt, "GPTModel", norms_last)
        run = Run(case, seed=99)
    run.train(1)
    before = moments_of(run)
    with pytest.raises(MismatchError) as refusal:
        run.load(directory)
    after = moments_of(run)
    return str(refusal.value), all(
        torch.equal(after[key][name], tensor) for key in before for name, tensor in before[key].items()
    )


def test_buffers_with_their_weights_in_another_order_are_refused(tmp_path: Path) -> None:
    run_on_ranks(2, save, Case(bf16=True), tmp_path, PARTS)
    for message, untouched in run_on_ranks(2, refused, Case(bf16=True), tmp_path):
        assert untouched
        assert "does not fit this run's optimizer" in message
        assert "the weights must lie in the same buffers: what model.transformer_impl and" in message
        assert "Save once there with fully_reshardable, or set checkpoint.finetune" in message

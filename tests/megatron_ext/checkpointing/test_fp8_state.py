"""Scales of delayed FP8 scaling in checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion.formats.megatron import MegatronCheckpoint
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError
from megatron_ext.checkpointing.fp8_state import _as_extra_state
from megatron_ext.config import RunConfig
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.training import loop
from tests.megatron_ext.model.fp8_layers import fp8_machine
from tests.megatron_ext.training.runs import tiny_run
from tests.ranks import run_on_ranks

LCKV = {"layer_types": "0_2_2_3", "forward_passes": 1, "backward_passes": 1}
DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed"}
Scales = dict[str, dict[str, float]]


def test_scales_go_on_where_they_were(tmp_path: Path) -> None:
    """Two data-parallel ranks. Then the same checkpoint with another recipe, and the other way round."""
    saving = {"save": str(tmp_path / "run"), "save_interval": 2}
    start = {"load": str(tmp_path / "run" / "iter_0000002")}
    straight, straight_scales = scales_of(fp8_run(DELAYED, saving))
    resumed, resumed_scales = scales_of(fp8_run(DELAYED, start))
    assert straight == {} and straight_scales == resumed_scales
    assert len(resumed) == len(resumed_scales) == 4 * 4, "four products in each of four layers"
    assert resumed != resumed_scales, "two more steps"
    assert set(next(iter(resumed.values()))) == {
        "scale_fwd",
        "amax_history_fwd",
        "scale_bwd",
        "amax_history_bwd",
    }
    stored = read_contents(tmp_path / "run" / "iter_0000002").state_dict_metadata
    assert sum("_extra_state" in key for key in stored) == 4 * 4
    MegatronCheckpoint(tmp_path / "run" / "iter_0000002")  # is converted as any other

    other = {"save": str(tmp_path / "other")}
    assert scales_of(fp8_run({"fp8": "hybrid"}, {**start, **other}, train_iters=3)) == ({}, {})
    began, _ = scales_of(fp8_run(DELAYED, {"load": str(tmp_path / "other")}))
    assert began == {}, "there are none to go on with"


def fp8_run(model: dict[str, Any], checkpoint: dict[str, Any], train_iters: int = 4) -> RunConfig:
    run = tiny_run(compression=LCKV, model=model, checkpoint=checkpoint, train={"train_iters": train_iters})
    return replace(run, optimizer=replace(run.optimizer, lr_decay_iters=10))


def scales_of(run: RunConfig) -> tuple[Scales, Scales]:
    """After loading, and at the end."""
    (first, second) = run_on_ranks(2, train, run)
    assert first == second
    return first


def train(run: RunConfig) -> tuple[Scales, Scales]:
    initialize(run.parallel, run.train.seed)
    stages, loaded, wrap, resume = [], [], loop.wrap, loop._resume

    def noting_wrap(stage: torch.nn.Module, *arguments: Any) -> Any:
        stages.append(stage)
        return wrap(stage, *arguments)

    def noting_resume(*arguments: Any) -> Any:
        result = resume(*arguments)
        loaded.append(scales(stages[0]))
        return result

    with fp8_machine(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "wrap", noting_wrap)
        patch.setattr(loop, "_resume", noting_resume)
        loop.fit(run)
    return loaded[0], scales(stages[0])


def scales(stage: torch.nn.Module) -> Scales:
    return {
        name: {key: value.item() for key, value in module.scaling.items()}
        for name, module in stage.named_modules()
        if getattr(module, "scaling", None)
    }


GOOD: dict[str, Any] = {
    **dict.fromkeys(("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd"), torch.ones(1)),
    "extra_fp8_variables": {},
}


@pytest.mark.parametrize(
    ("saved", "missing"),
    [
        ({}, "scale_fwd"),
        ({**GOOD, "scale_bwd": 3}, "scale_bwd"),
        ({**GOOD, "extra_fp8_variables": 0}, "extra"),
    ],
)
def test_what_is_no_scaling_is_damage(saved: dict[str, Any], missing: str) -> None:
    with pytest.raises(DamagedCheckpointError, match=f"layer._extra_state is no FP8 scaling: {missing}.* is"):
        _as_extra_state("layer._extra_state", saved, "recipe")

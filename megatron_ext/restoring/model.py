"""A trained model for looking at: from a checkpoint, without optimizer, on any layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lckv.errors import ModelError
from lckv.weights.json_file import read_json_object
from megatron_ext.checkpointing.folders import find_candidates
from megatron_ext.checkpointing.load import load_checkpoint
from megatron_ext.command_line import config_from_dict
from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.build import build_stage
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.restoring.chosen_map import chosen_map
from megatron_ext.validation.layout import layout_problems, process_problems

_SETTINGS = "config.json"


@dataclass(frozen=True)
class Restored:
    """This rank's stage of a trained model, in evaluation mode,
    and the run that made it (with the layout of now)."""

    stage: SharedKVGPTModel
    run: RunConfig
    iteration: int


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings stored in the checkpoint that `path` means
    (one checkpoint, or a directory: the newest readable)."""
    candidates = find_candidates(path).checkpoints
    for checkpoint in candidates:
        try:
            return read_json_object(checkpoint / _SETTINGS)
        except ModelError:
            continue
    raise ConfigError(f"{path}: no {_SETTINGS} can be read in {', '.join(map(str, candidates))}.")


def restore(
    path: Path,
    parallel: ParallelConfig,
    *,
    layer_types: str | None = None,
    verify_hashes: bool = True,
    in_float32: bool = False,
) -> Restored:
    """Build this rank's stage on the layout `parallel` and load its weights. Needs process groups.

    `layer_types`: the map with which a model runs that was trained with a family of them; of another model
    its own, or None. Sequence parallelism and FP8, which are for training and restrict lengths, are left out.
    With `in_float32` the model computes in float32 and nothing coarser, whatever the run did.

    Raises ConfigError where the model does not fit the layout, and CheckpointError as `load_checkpoint` does.
    """
    saved = saved_settings(path)
    if not isinstance(saved.get("architecture"), dict):
        raise ConfigError(
            f"{path}: {_SETTINGS} has no `architecture`; give a checkpoint that a run has saved."
        )
    defining = {"architecture": saved.pop("architecture")}
    run = config_from_dict(saved)
    parallel = replace(parallel, sequence_parallel=False, tp_comm_overlap=False)
    run = replace(run, model=replace(run.model, fp8=None), parallel=parallel)
    run = replace(run, train=replace(run.train, recompute_granularity="none", activation_offload="none"))
    if in_float32:  # Transformer Engine multiplies float32 matrices in TF32, and flash-attn has no float32
        model = replace(run.model, transformer_impl="local", attention_backend="auto")
        run = replace(run, model=model, train=replace(run.train, precision="fp32"))
    chosen = chosen_map(path, run.compression, run.model.num_layers, layer_types)
    if problems := [*layout_problems(run), *process_problems(parallel, dist.get_world_size())]:
        raise ConfigError("\n".join(problems))
    vocab_size = defining["architecture"]["vocab_size"]
    stage = build_stage(run.model, run.compression, parallel, run.train, vocab_size=vocab_size)
    loaded = load_checkpoint(path, model=[stage], verify_hashes=verify_hashes, expected_model=defining)
    stage.decoder.take(chosen)
    stage.eval()
    return Restored(stage, replace(run, compression=chosen), loaded.iteration)

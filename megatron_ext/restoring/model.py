"""A trained model for looking at: from a checkpoint, without optimizer, on any layout."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpointing.load import load_checkpoint
from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.restoring.description import Description, describe_checkpoint


@dataclass(frozen=True)
class Restored:
    """This rank's stage of a trained model, in evaluation mode,
    and the run that made it (with the layout of now)."""

    stage: SharedKVGPTModel
    run: RunConfig
    iteration: int


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
    described = describe_checkpoint(path, parallel, layer_types=layer_types, in_float32=in_float32)
    described.require_layout(dist.get_world_size())
    stage = build_described(described)
    loaded = load_checkpoint(
        path,
        model=[stage],
        verify_hashes=verify_hashes,
        expected_model={"architecture": described.architecture},
    )
    chosen = described.chosen or described.run.compression
    stage.decoder.take(chosen)
    return Restored(stage.eval(), replace(described.run, compression=chosen), loaded.iteration)


def build_described(described: Description) -> SharedKVGPTModel:
    """This rank's stage of the model, with initial weights. Needs process groups."""
    run = described.run
    return build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=described.vocab_size)

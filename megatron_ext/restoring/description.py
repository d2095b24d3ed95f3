"""A trained model before its weights are read: what it is, and with which layout it would be here. Neither
torch nor Megatron is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.weights.json_file import read_json_object
from megatron_ext.checkpointing.folders import find_candidates
from megatron_ext.command_line import config_from_dict
from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.restoring.chosen_map import chosen_map
from megatron_ext.validation.layout import layout_problems, process_problems

_SETTINGS = "config.json"


@dataclass(frozen=True)
class Description:
    """A trained model on a layout."""

    run: RunConfig
    """That made it, with the layout and the kind of steps of now: nothing is recomputed."""

    vocab_size: int
    """Without padding."""

    architecture: Mapping[str, Any] | None = None
    """As its checkpoint says; None: it is no checkpoint."""

    chosen: CompressionConfig | None = None
    """With the map with which it runs, of a model that was trained with a family of them; None: its own."""

    def layout_problems(self, world_size: int) -> list[str]:
        """Why the model does not fit its layout, or that the number of processes."""
        return [*layout_problems(self.run), *process_problems(self.run.parallel, world_size)]

    def require_layout(self, world_size: int) -> None:
        """Raises ConfigError where there is such a problem."""
        if problems := self.layout_problems(world_size):
            raise ConfigError("\n".join(problems))


def describe_checkpoint(
    path: Path, parallel: ParallelConfig, *, layer_types: str | None = None, in_float32: bool = False
) -> Description:
    """Of the checkpoint that `path` means. Arguments are those of `restore`.

    Raises ConfigError where its settings cannot be read, or it does not say with which map it is to run.
    """
    saved = saved_settings(path)
    architecture = saved.pop("architecture", None)
    if not isinstance(architecture, dict):
        raise ConfigError(
            f"{path}: {_SETTINGS} has no `architecture`; give a checkpoint that a run has saved."
        )
    run = config_from_dict(saved)
    parallel = replace(parallel, sequence_parallel=False, tp_comm_overlap=False)
    run = replace(run, model=replace(run.model, fp8=None), parallel=parallel)
    run = replace(run, train=replace(run.train, recompute_granularity="none", activation_offload="none"))
    if in_float32:  # Transformer Engine multiplies float32 matrices in TF32, and flash-attn has no float32
        model = replace(run.model, transformer_impl="local", attention_backend="auto")
        run = replace(run, model=model, train=replace(run.train, precision="fp32"))
    chosen = chosen_map(path, run.compression, run.model.num_layers, layer_types)
    return Description(run, int(architecture["vocab_size"]), architecture, chosen)


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

"""A trained model that is not stored as a checkpoint, on the layout of a run. How such models are read is not
known here: the program that starts the run hands it in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.weights.tensors import TensorSource
from megatron_ext.checkpointing.agreement import agreement
from megatron_ext.checkpointing.foreign import load_weights
from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.build import build_stage
from megatron_ext.precision import Precision
from megatron_ext.restoring.model import Restored
from megatron_ext.validation.layout import layout_problems, process_problems


@dataclass(frozen=True)
class ForeignModel:
    """A model of another format, opened."""

    model: ModelConfig
    """vocab_size is the true size."""

    compression: CompressionConfig
    precision: Precision
    """That can hold the weights."""

    weights: TensorSource
    """Whole tensors under the keys that this project's checkpoints have; nothing is read yet."""


OpenForeign = Callable[[Path], ForeignModel]
"""Opens the model of a folder; raises ModelError where it cannot be read."""


def restore_foreign(
    path: Path,
    open_foreign: OpenForeign,
    parallel: ParallelConfig,
    *,
    seq_length: int,
    make_vocab_size_divisible_by: int,
    timeout_minutes: float,
) -> Restored:
    """Build this rank's stage on the layout `parallel` and fill it with the weights of the model in `path`.
    Needs process groups; all ranks call it together. Otherwise as `restore`.

    Raises ConfigError where the model cannot be read, or does not fit the layout.
    """
    with agreement(timeout_minutes) as ranks:
        opened = ranks.everywhere("open the model", lambda: _opened(path, open_foreign))
        vocab_size = opened.model.vocab_size
        assert vocab_size is not None
        run = RunConfig(
            model=replace(opened.model, make_vocab_size_divisible_by=make_vocab_size_divisible_by),
            compression=opened.compression,
            parallel=replace(parallel, sequence_parallel=False, tp_comm_overlap=False),
            train=TrainConfig(precision=opened.precision.name, seq_length=seq_length),
        )
        if problems := [*layout_problems(run), *process_problems(run.parallel, dist.get_world_size())]:
            raise ConfigError("\n".join(problems))
        stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=vocab_size)
        load_weights(ranks, opened.weights, stage)
    stage.decoder.take(run.compression)
    return Restored(stage.eval(), run, iteration=0)


def _opened(path: Path, open_foreign: OpenForeign) -> ForeignModel:
    try:
        return open_foreign(path)
    except ModelError as error:
        raise ConfigError(str(error)) from error

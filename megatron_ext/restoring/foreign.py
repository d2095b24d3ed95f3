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
from megatron_ext.precision import Precision
from megatron_ext.restoring.description import Description
from megatron_ext.restoring.model import Restored, build_described


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
        described = _described(
            opened,
            parallel,
            seq_length=seq_length,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        )
        described.require_layout(dist.get_world_size())
        stage = build_described(described)
        load_weights(ranks, opened.weights, stage)
    stage.decoder.take(described.run.compression)
    return Restored(stage.eval(), described.run, iteration=0)


def describe_foreign(
    path: Path,
    open_foreign: OpenForeign,
    parallel: ParallelConfig,
    *,
    seq_length: int,
    make_vocab_size_divisible_by: int,
) -> Description:
    """Of the model in `path`, whose weights are not read. Arguments are those of `restore_foreign`.

    Raises ConfigError where it cannot be opened.
    """
    return _described(
        _opened(path, open_foreign),
        parallel,
        seq_length=seq_length,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )


def _described(
    opened: ForeignModel, parallel: ParallelConfig, *, seq_length: int, make_vocab_size_divisible_by: int
) -> Description:
    assert opened.model.vocab_size is not None
    run = RunConfig(
        model=replace(opened.model, make_vocab_size_divisible_by=make_vocab_size_divisible_by),
        compression=opened.compression,
        parallel=replace(parallel, sequence_parallel=False, tp_comm_overlap=False),
        train=TrainConfig(precision=opened.precision.name, seq_length=seq_length),
    )
    return Description(run, opened.model.vocab_size)


def _opened(path: Path, open_foreign: OpenForeign) -> ForeignModel:
    try:
        return open_foreign(path)
    except ModelError as error:
        raise ConfigError(str(error)) from error

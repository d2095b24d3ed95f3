"""A Hugging Face model for a run that reads it where it lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from checkpoints_conversion.formats.megatron import megatron_keys
from checkpoints_conversion.opening import open_huggingface
from lckv.weights.tensors import TensorInfo, TensorSource
from megatron_ext.precision import precision_for
from megatron_ext.restoring.foreign import ForeignModel


def open_for_training(folder: Path) -> ForeignModel:
    """The model of a Hugging Face folder, of any family that is converted. Raises ModelError."""
    opened = open_huggingface(folder)
    model = opened.description
    weights = _UnderKeys(opened.source)
    return ForeignModel(model.model, model.compression, precision_for(model.dtype), weights)


@dataclass(frozen=True)
class _UnderKeys:
    """Canonical tensors under the keys of a checkpoint."""

    canonical: TensorSource

    @cached_property
    def _names(self) -> dict[str, str]:
        return megatron_keys(self.canonical.infos().keys())

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its key."""
        infos = self.canonical.infos()
        return {key: infos[name] for key, name in self._names.items()}

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        return self.canonical.read(self._names[key], rows)

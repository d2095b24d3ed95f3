"""From canonical tensors to those of a family and back, row by row.

A canonical tensor is one tensor of Hugging Face's, or several interleaved by rows: in each of `groups` equal
groups the same number of rows of each part. The fused query-key-value matrix has one group for each key/value
head; the gated MLP one group with the gate above the up projection.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from checkpoints_conversion.tensors import CHUNK_BYTES, ConversionError, TensorInfo, TensorSource
from megatron_ext.config import ModelConfig

WeightNames = Mapping[str, tuple[str, ...]]
"""From canonical names to those of a family, with {} for the number of the layer; several where rows are
interleaved."""
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Part:
    """Rows of one of the tensors that make up a canonical tensor."""

    name: str
    rows_per_group: int


@dataclass(frozen=True)
class Fusion:
    """What a canonical tensor is made of."""

    parts: tuple[Part, ...]
    groups: int

    def runs(self, longest: int) -> Iterator[tuple[str, slice, slice]]:
        """(part, its rows, the rows of the canonical tensor) for every stretch of at most `longest` rows that
        is connected in both."""
        row = 0
        for group in range(self.groups):
            for part in self.parts:
                size = part.rows_per_group
                for start in range(0, size, longest):
                    count = min(longest, size - start)
                    theirs = group * size + start
                    yield part.name, slice(theirs, theirs + count), slice(row + start, row + start + count)
                row += size


def fusion_of(canonical: str, info: TensorInfo, names: WeightNames, model: ModelConfig) -> Fusion:
    """What the canonical tensor is made of in a family with these names; raises ConversionError where it has
    no such tensor."""
    layer = _LAYER.search(canonical)
    templates = names.get(_LAYER.sub("{}", canonical))
    if templates is None:
        raise ConversionError(f"{canonical}: the family of the model has no such tensor.")
    found = [template.format(layer[0] if layer else "") for template in templates]
    if len(found) == 1:
        return Fusion((Part(found[0], info.shape[0]),), 1)
    if len(found) == 3:
        group = model.num_attention_heads // model.query_groups * model.head_dim
        rows = (group, model.head_dim, model.head_dim)
        return Fusion(tuple(map(Part, found, rows)), model.query_groups)
    return Fusion(tuple(Part(name, info.shape[0] // len(found)) for name in found), 1)


def infos_of_parts(infos: Mapping[str, TensorInfo], fusions: Mapping[str, Fusion]) -> dict[str, TensorInfo]:
    """The family's tensors, from the canonical ones."""
    return {
        part.name: TensorInfo(
            (part.rows_per_group * fusion.groups, *infos[canonical].shape[1:]), infos[canonical].dtype
        )
        for canonical, fusion in fusions.items()
        for part in fusion.parts
    }


@dataclass(frozen=True)
class FusedSource:
    """Canonical tensors out of a family's."""

    parts: TensorSource
    fusions: Mapping[str, Fusion]
    """By canonical names, in writing order."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """The canonical tensors. Raises ConversionError where tensors that become one have several dtypes."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos = self.parts.infos()
        return {name: self._info(infos, fusion) for name, fusion in self.fusions.items()}

    @staticmethod
    def _info(infos: Mapping[str, TensorInfo], fusion: Fusion) -> TensorInfo:
        dtypes = {part.name: infos[part.name].dtype for part in fusion.parts}
        if len(set(dtypes.values())) > 1:
            given = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
            raise ConversionError(f"{given}: these tensors become one; give them one dtype.")
        first = infos[fusion.parts[0].name]
        return TensorInfo(
            (sum(infos[part.name].shape[0] for part in fusion.parts), *first.shape[1:]), first.dtype
        )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop."""
        fusion = self.fusions[name]
        if len(fusion.parts) == 1:
            return self.parts.read(fusion.parts[0].name, rows)
        info = self._infos[name]
        start, stop, result = _rows_to_fill(info, rows)
        for part, theirs, ours in fusion.runs(_longest(info)):
            first, last = max(start, ours.start), min(stop, ours.stop)
            if first < last:
                shift = theirs.start - ours.start
                result[first - start : last - start] = self.parts.read(
                    part, slice(first + shift, last + shift)
                )
        return result


@dataclass(frozen=True)
class SplitSource:
    """A family's tensors out of canonical ones."""

    canonical: TensorSource
    fusions: Mapping[str, Fusion]
    """By canonical names, in writing order."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """The family's tensors."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return infos_of_parts(self.canonical.infos(), self.fusions)

    @cached_property
    def _whole(self) -> dict[str, str]:
        """The canonical tensor that each of the family's is part of."""
        return {part.name: name for name, fusion in self.fusions.items() for part in fusion.parts}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop."""
        canonical = self._whole[name]
        fusion = self.fusions[canonical]
        if len(fusion.parts) == 1:
            return self.canonical.read(canonical, rows)
        info = self._infos[name]
        start, stop, result = _rows_to_fill(info, rows)
        for part, theirs, ours in fusion.runs(_longest(info)):
            first, last = max(start, theirs.start), min(stop, theirs.stop)
            if part == name and first < last:
                shift = ours.start - theirs.start
                result[first - start : last - start] = self.canonical.read(
                    canonical, slice(first + shift, last + shift)
                )
        return result


def _rows_to_fill(info: TensorInfo, rows: slice | None) -> tuple[int, int, Tensor]:
    start, stop = (0, info.shape[0]) if rows is None else (rows.start, rows.stop)
    return start, stop, torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)


def _longest(info: TensorInfo) -> int:
    """Rows that are copied at a time."""
    return max(1, CHUNK_BYTES * info.shape[0] // max(info.nbytes, 1))

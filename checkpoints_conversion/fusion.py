"""Canonical names of weights, and how their tensors are made of those of a Hugging Face model, row by row.

Canonical names are Megatron's, of whole tensors, layers counted from the bottom, without vocabulary padding.
With h the hidden size, a query heads, g key/value heads, d channels per head, f the width of the MLP and V
the true vocabulary size:

    embedding.word_embeddings.weight [V, h]         output_layer.weight [V, h] (absent where tied)
    decoder.final_layernorm.weight [h]
    decoder.layers.N.input_layernorm.weight [h]     decoder.layers.N.pre_mlp_layernorm.weight [h]
    decoder.layers.N.self_attention.linear_qkv.weight [(a + 2 g) d, h], .bias
        where the layer computes keys and values: for each key/value head the rows of its query heads, of the
        key and of the value
    decoder.layers.N.self_attention.linear_q.weight [a d, h], .bias
        where the layer only reads those of another one
    decoder.layers.N.self_attention.linear_first_guess.weight [2 g d, h]
        of a first guess: for each key/value head the rows of the key and of the value
    decoder.layers.N.self_attention.{key,value}_weight [2]
        where the layer mixes keys and values of another one into its own
    decoder.layers.N.self_attention.NAME.weight [g, h], .bias, .NAME_norm.weight [h]
        of a KV policy that has parameters of its own, under its name
    decoder.layers.N.self_attention.{q,k}_layernorm.weight [d]
    decoder.layers.N.self_attention.linear_proj.weight [h, a d]
    decoder.layers.N.mlp.linear_fc1.weight [2 f, h], gate above up
    decoder.layers.N.mlp.linear_fc2.weight [h, f]

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

from checkpoints_conversion.errors import ConversionError
from lckv.families.base import Family
from lckv.families.decoder import Decoder
from lckv.families.weights import WeightNames
from lckv.policies.config import Projection
from lckv.weights.checks import check_tensors
from lckv.weights.tensors import CHUNK_BYTES, TensorInfo, TensorSource, dtype_name

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_QKV, _QUERY_ONLY, _GUESS = (
    f"decoder.layers.{{}}.self_attention.linear_{name}" for name in ("qkv", "q", "first_guess")
)


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


def _canonical_modules(names: WeightNames, projection: Projection | None) -> dict[str, tuple[str, ...]]:
    """Canonical names of modules, with {} for the number of the layer, and the names of those that they are
    made of: several where rows are interleaved."""
    layer = "decoder.layers.{}."
    own = () if projection is None else (projection.name, projection.norm_name)
    return {
        "embedding.word_embeddings": (names.embedding,),
        f"{layer}input_layernorm": (names.input_norm,),
        _QKV: (names.query, names.key, names.value),
        _QUERY_ONLY: (names.query,),
        _GUESS: (names.guessed_key, names.guessed_value),
        f"{layer}self_attention": (names.attention,),
        **{f"{layer}self_attention.{name}": (f"{names.attention}.{name}",) for name in own},
        f"{layer}self_attention.q_layernorm": (names.query_norm,),
        f"{layer}self_attention.k_layernorm": (names.key_norm,),
        f"{layer}self_attention.linear_proj": (names.output,),
        f"{layer}pre_mlp_layernorm": (names.mlp_norm,),
        f"{layer}mlp.linear_fc1": (names.gate, names.up),
        f"{layer}mlp.linear_fc2": (names.down,),
        "decoder.final_layernorm": (names.final_norm,),
        "output_layer": (names.head,),
    }


def fusions_of(decoder: Decoder, family: Family) -> dict[str, Fusion]:
    """What each canonical tensor of the decoder is made of in the family,
    by canonical names in writing order."""
    infos = family.tensors(decoder)
    modules = _canonical_modules(family.names, decoder.compression.policy.traits.projection)
    canonical = {name: module for module, names in modules.items() for name in names if module != _QUERY_ONLY}
    fusions: dict[str, Fusion] = {}
    for name in infos:
        number = _LAYER.search(name)
        layer = number[0] if number else ""
        module, _, kind = _LAYER.sub("{}", name).rpartition(".")
        target = canonical[module]
        if target == _QKV and f"{family.names.key.format(layer)}.{kind}" not in infos:
            target = _QUERY_ONLY
        parts = [f"{part.format(layer)}.{kind}" for part in modules[target]]
        groups = decoder.num_key_value_heads if target in (_QKV, _GUESS) else 1
        fusions[f"{target.format(layer)}.{kind}"] = Fusion(
            tuple(Part(part, infos[part].shape[0] // groups) for part in parts), groups
        )
    return fusions


def canonical_tensors(decoder: Decoder, family: Family) -> dict[str, TensorInfo]:
    """The tensors, under canonical names, that the decoder must have; in writing order."""
    infos = family.tensors(decoder)
    return {name: _fused_info(infos, fusion) for name, fusion in fusions_of(decoder, family).items()}


def canonical_from_hf(
    hf: TensorSource, decoder: Decoder, family: Family, where: object = "the model"
) -> TensorSource:
    """Canonical tensors that are read from Hugging Face's when they are asked for.

    Raises ModelError that names all tensors of `hf`, which come from `where`,
    that are missing, superfluous or misshapen.
    """
    family.check_weights(hf, decoder, where)
    source = FusedSource(hf, fusions_of(decoder, family))
    source.infos()  # says what cannot become one tensor
    return source


def hf_from_canonical(
    source: TensorSource, decoder: Decoder, family: Family, where: object = "the model"
) -> TensorSource:
    """Hugging Face's tensors that are read from canonical ones when they are asked for;
    errors as in `canonical_from_hf`."""
    check_tensors(source.infos(), canonical_tensors(decoder, family), where)
    return SplitSource(source, fusions_of(decoder, family))


def _fused_info(infos: Mapping[str, TensorInfo], fusion: Fusion) -> TensorInfo:
    dtypes = {part.name: infos[part.name].dtype for part in fusion.parts}
    if len(set(dtypes.values())) > 1:
        given = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in dtypes.items())
        raise ConversionError(f"{given}: these tensors become one; give them one dtype.")
    first = infos[fusion.parts[0].name]
    return TensorInfo(
        (sum(infos[part.name].shape[0] for part in fusion.parts), *first.shape[1:]), first.dtype
    )


def _infos_of_parts(infos: Mapping[str, TensorInfo], fusions: Mapping[str, Fusion]) -> dict[str, TensorInfo]:
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
        return {name: _fused_info(infos, fusion) for name, fusion in self.fusions.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop."""
        fusion = self.fusions[name]
        if len(fusion.parts) == 1:
            return self.parts.read(fusion.parts[0].name, rows)
        info = self._infos[name]
        start, stop, result = _rows_to_fill(info, rows)
        if stop - start == info.shape[0] and info.nbytes <= CHUNK_BYTES:
            self._interleave(fusion, result.unflatten(0, (fusion.groups, -1)))
            return result
        for part, theirs, ours in fusion.runs(_longest(info)):
            first, last = max(start, ours.start), min(stop, ours.stop)
            if first < last:
                shift = theirs.start - ours.start
                result[first - start : last - start] = self.parts.read(
                    part, slice(first + shift, last + shift)
                )
        return result

    def _interleave(self, fusion: Fusion, groups: Tensor) -> None:
        """Fills [groups, rows of a group, ...], each part read as a whole: a small tensor has many short
        stretches."""
        row = 0
        for part in fusion.parts:
            rows = self.parts.read(part.name).unflatten(0, (fusion.groups, -1))
            groups[:, row : row + part.rows_per_group] = rows
            row += part.rows_per_group


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
        return _infos_of_parts(self.canonical.infos(), self.fusions)

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

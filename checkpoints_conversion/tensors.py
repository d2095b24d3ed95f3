"""Named weights that are read one at a time: what a converter reads from, and what a model must have.

Canonical names are Megatron's, of whole tensors, layers counted from the bottom, without vocabulary padding.
With h the hidden size, a query heads, g key/value heads, d channels per head, f the width of the MLP and V
the true vocabulary size:

    embedding.word_embeddings.weight [V, h]           output_layer.weight [V, h] (absent where tied)
    decoder.final_layernorm.weight [h]
    decoder.layers.N.input_layernorm.weight [h]       decoder.layers.N.pre_mlp_layernorm.weight [h]
    decoder.layers.N.self_attention.linear_qkv.weight [(a + 2 g) d, h], .bias   where the layer computes keys and values:
        for each key/value head the rows of its query heads, of the key and of the value
    decoder.layers.N.self_attention.linear_q.weight [a d, h], .bias             where it only reads those of another layer
    decoder.layers.N.self_attention.{q,k}_layernorm.weight [d]
    decoder.layers.N.self_attention.linear_proj.weight [h, a d]
    decoder.layers.N.mlp.linear_fc1.weight [2 f, h], gate above up              decoder.layers.N.mlp.linear_fc2.weight [h, f]
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConfigError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Kinds of numbers that a model's weights may have."""
CHUNK_BYTES = 8 * 2**20
"""How much of a tensor is copied at a time."""
_SHOWN = 5
"""Names that one line of an error lists."""


class ConversionError(ConfigError):
    """A model that cannot be converted: the message says which file, field or tensor, what is wrong and the
    way out."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A model's tensors, of which nothing is in memory until it is read."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name, in the order in which they are best read and written."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor on the CPU: whole, or the rows start:stop of its first axis.

        Takes no more memory than the result and a small constant. Raises KeyError for a name not in `infos()`
        and ConversionError where its file turns out to be damaged.
        """


@dataclass(frozen=True)
class MemorySource:
    """Tensors that are in memory."""

    tensors: Mapping[str, Tensor]

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, in the order given."""
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or a view of its rows."""
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def row_chunks(info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """The tensor's rows from the first to the last, in slices of about `chunk_bytes` (at least one row)."""
    rows = info.shape[0]
    step = max(1, chunk_bytes * rows // max(info.nbytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def expected_tensors(
    model: ModelConfig, compression: CompressionConfig, vocab_size: int, dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """The tensors, under canonical names, that a model must have."""
    hidden, heads, groups, width = (
        model.hidden_size,
        model.num_attention_heads,
        model.query_groups,
        model.head_dim,
    )
    kv_layers = compression.map(model.num_layers).kv_layers
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab_size, hidden)}
    for index in range(model.num_layers):
        layer = f"decoder.layers.{index}."
        attention = f"{layer}self_attention."
        computes_kv = index in kv_layers
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        projection = f"{attention}linear_qkv" if computes_kv else f"{attention}linear_q"
        rows = (heads + 2 * groups * computes_kv) * width
        shapes[f"{projection}.weight"] = (rows, hidden)
        if model.add_qkv_bias:
            shapes[f"{projection}.bias"] = (rows,)
        if model.qk_layernorm:
            shapes[f"{attention}q_layernorm.weight"] = (width,)
            if computes_kv:
                shapes[f"{attention}k_layernorm.weight"] = (width,)
        shapes[f"{attention}linear_proj.weight"] = (hidden, heads * width)
        shapes[f"{layer}pre_mlp_layernorm.weight"] = (hidden,)
        shapes[f"{layer}mlp.linear_fc1.weight"] = (2 * model.ffn_size, hidden)
        shapes[f"{layer}mlp.linear_fc2.weight"] = (hidden, model.ffn_size)
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocab_size, hidden)
    return {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}


def check_tensors(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], where: object) -> None:
    """Raises one ConversionError that says everything in which `found`, the tensors of `where`, differ from
    `expected`: names and shapes, and numbers that are no weights. Any of `WEIGHT_DTYPES` will do."""
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    dtypes = [f"{name} {_name(found[name].dtype)}" for name in both if found[name].dtype not in WEIGHT_DTYPES]
    lines = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("not part of the model", [name for name in found if name not in expected]),
        _listed("of another shape", shapes),
        _listed(f"not of {', '.join(map(_name, WEIGHT_DTYPES))}", dtypes),
    ]
    if any(lines):
        raise ConversionError(
            "\n".join(
                [
                    f"{where}: the tensors are not those of the model that its configuration describes.",
                    *(f"  {line}" for line in lines if line),
                    "Give the configuration that belongs to these weights, or all of the weights.",
                ]
            )
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(problem: str, entries: list[str]) -> str:
    if not entries:
        return ""
    rest = len(entries) - _SHOWN
    return f"{len(entries)} {problem}: {', '.join(entries[:_SHOWN])}{f' and {rest} more' if rest > 0 else ''}"


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Raises ConversionError where the weights `tensor`, called `name` in `where`, contain NaN or
    infinity."""
    flat = tensor.reshape(-1)
    for part in flat.split(CHUNK_BYTES // tensor.element_size()):
        if not part.isfinite().all():
            bad = int((~flat.isfinite()).sum())
            raise ConversionError(
                f"{where}: {name} contains {bad} of {flat.numel()} values that are NaN or infinite. Such a "
                "model cannot work: "
                "take another checkpoint of it."
            )

"""What is checked of weights: names, shapes, dtypes, and that every number is finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lckv.errors import ModelError
from lckv.weights.tensors import CHUNK_BYTES, WEIGHT_DTYPES, TensorInfo, TensorSource, dtype_name

_SHOWN = 5
"""Names that one line of an error lists."""


def check_tensors(given: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], where: object) -> None:
    """Compares the tensors `given`, those of `where`, with the `expected` ones: names and shapes. Any of
    `WEIGHT_DTYPES` will do.

    Raises one ModelError that says everything in which they differ, and which numbers are no weights.
    """
    both = [name for name in expected if name in given]
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(expected[name].shape)}"
        for name in both
        if given[name].shape != expected[name].shape
    ]
    dtypes = [
        f"{name} {dtype_name(given[name].dtype)}" for name in both if given[name].dtype not in WEIGHT_DTYPES
    ]
    lines = [
        _listed("missing", [name for name in expected if name not in given]),
        _listed("not part of the model", [name for name in given if name not in expected]),
        _listed("of another shape", shapes),
        _listed(f"not of {', '.join(map(dtype_name, WEIGHT_DTYPES))}", dtypes),
    ]
    if any(lines):
        raise ModelError(
            "\n".join(
                [
                    f"{where}: the tensors are not those of the model that its configuration describes.",
                    *(f"  {line}" for line in lines if line),
                    "Give the configuration that belongs to these weights, or all of the weights.",
                ]
            )
        )


def _listed(problem: str, entries: list[str]) -> str:
    if not entries:
        return ""
    rest = len(entries) - _SHOWN
    return f"{len(entries)} {problem}: {', '.join(entries[:_SHOWN])}{f' and {rest} more' if rest > 0 else ''}"


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Looks for NaN and infinity in the weights `tensor`, called `name` in `where`.

    Raises ModelError that says how many there are.
    """
    flat = tensor.reshape(-1)
    for part in flat.split(CHUNK_BYTES // tensor.element_size()):
        if not part.isfinite().all():
            bad = int((~flat.isfinite()).sum())
            raise ModelError(
                f"{where}: {name} contains {bad} of {flat.numel()} values that are NaN or infinite. Such a "
                "model cannot work: take another checkpoint of it."
            )


@dataclass(frozen=True)
class CheckedSource:
    """A source of which `read` raises ModelError for weights that are NaN or infinite."""

    source: TensorSource
    where: object
    """Folder or file of the weights, for the message."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """As of the source."""
        return self.source.infos()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As of the source."""
        tensor = self.source.read(name, rows)
        if not _is_finite(tensor):
            check_finite(name, tensor, self.where)
        return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. The extremes, which NaN passes on to, are found some 30 times
    faster than by `isfinite`."""
    return tensor.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())

"""What happens to tensors on their way from one format to the other: cast, counted. Each a source
around a source."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from lckv.weights.tensors import TensorInfo, TensorSource


@dataclass(frozen=True)
class CastSource:
    """The same weights as numbers of another kind, rounded to the nearest."""

    source: TensorSource
    dtype: torch.dtype

    def infos(self) -> Mapping[str, TensorInfo]:
        """As of the source, in `dtype`."""
        return {name: replace(info, dtype=self.dtype) for name, info in self.source.infos().items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As of the source, in `dtype`."""
        return self.source.read(name, rows).to(self.dtype)


@dataclass(frozen=True)
class CountedSource:
    """Moves a progress bar by the bytes read."""

    source: TensorSource
    bar: tqdm

    def infos(self) -> Mapping[str, TensorInfo]:
        """As of the source."""
        return self.source.infos()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As of the source."""
        tensor = self.source.read(name, rows)
        self.bar.update(tensor.nbytes)
        return tensor


def model_bytes(source: TensorSource) -> int:
    """Size of all tensors together."""
    return sum(info.nbytes for info in source.infos().values())


@contextmanager
def shown_progress(source: TensorSource, task: str) -> Iterator[TensorSource]:
    """`source`, whose reading moves a bar in the terminal; nothing is shown where stderr is none."""
    with tqdm(
        total=model_bytes(source),
        desc=task,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        file=sys.stderr,
    ) as bar:
        yield CountedSource(source, bar)

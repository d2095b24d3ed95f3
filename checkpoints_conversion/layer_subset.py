"""A model cut down to some of its layers, so that a proof of a large model needs the memory of a few."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerType, LayerTypes
from lckv.weights.tensors import TensorInfo, TensorSource

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that a text such as "0,5,38-39" names, ascending.

    Raises ConversionError for what is no such list, and for layers that the model does not have.
    """
    layers: set[int] = set()
    for entry in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", entry)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConversionError(
                f"--layers is {text!r}; it must be a list of layers and ranges of them, such as 0,5,38-39."
            )
        if last >= num_layers:
            raise ConversionError(f"--layers is {text!r}; the model has the layers 0 to {num_layers - 1}.")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def with_sources(
    layer_types: LayerTypes, wanted: Iterable[int], *, first_guess: bool = False
) -> tuple[int, ...]:
    """The layers `wanted` and all whose keys and values they need, to read them or to mix them into their
    own, ascending.

    A layer with weights for keys and values keeps a layer that reads both, or they would be left out. With a
    first guess, one that a layer below it reads keeps one of these, or it would have no guess. Where two are
    read together through a window, and caches keep all their tokens, each keeps a layer that reads it without
    a window.
    """
    chosen: set[int] = set()
    missing = set(wanted)
    while missing:
        chosen |= missing
        missing = {layer for reader in chosen for layer in _taken(layer_types[reader])} - chosen
        unread = {
            layer for layer in layer_types.kv_layers if chosen.isdisjoint(layer_types.first_readers(layer))
        }
        for source in layer_types.cyclic_sources if first_guess else ():
            if not any(reader < source for reader in chosen.intersection(layer_types.readers(source))):
                unread.add(source)
        missing |= {layer_types.first_readers(layer)[0] for layer in chosen & unread}
        for source in _read_together(layer_types, chosen) - set(layer_types.windowed_kv_layers):
            whole = [reader for reader in layer_types.readers(source) if not layer_types[reader].sliding]
            missing |= set(whole[:1]) if chosen.isdisjoint(whole) else set()
    return tuple(sorted(chosen))


def _taken(layer: LayerType) -> set[int]:
    """The layers whose keys and values it reads, or mixes into its own."""
    return {*layer.sources, *(() if layer.borrows is None else (layer.borrows,))}


def _read_together(layer_types: LayerTypes, readers: Iterable[int]) -> set[int]:
    """Layers that one of `readers` reads together with another."""
    of_two = (layer_types[reader].sources for reader in readers if layer_types[reader].second is not None)
    return {source for sources in of_two for source in sources}


def runs_of_layers(num_layers: int, at_once: int) -> Iterator[range]:
    """All layers from the bottom to the top, `at_once` at a time."""
    for first in range(0, num_layers, at_once):
        yield range(first, min(first + at_once, num_layers))


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers spread evenly from the lowest to the highest, at most all."""
    count = min(count, num_layers)
    return tuple(round(index * (num_layers - 1) / max(count - 1, 1)) for index in range(count))


def cut_description(description: ModelDescription, layers: tuple[int, ...]) -> ModelDescription:
    """The model of the given layers alone, ascending and with all that they read, numbered anew."""
    layer_types = description.compression.map(description.model.num_layers)
    number = {layer: index for index, layer in enumerate(layers)}
    kept = LayerTypes(
        tuple(
            replace(
                layer_types[layer],
                index=number[layer],
                source=number[layer_types[layer].source],
                mixes=None if (mixes := layer_types[layer].mixes) is None else number[mixes],
                values=None if (values := layer_types[layer].values) is None else number[values],
            )
            for layer in layers
        )
    )
    compression = replace(
        description.compression,
        layer_types=str(kept),
        sliding_window=description.compression.sliding_window if kept.any_sliding else None,
    )
    if not kept.any_mixed:
        compression = replace(compression, mix_scaling_factor=CompressionConfig().mix_scaling_factor)
    if not kept.any_cyclic:
        compression = replace(compression, first_guess=False, agreement_loss_coefficient=0.0)
    model = replace(description.model, num_layers=len(layers))
    return replace(description, model=model, compression=compression)


@dataclass(frozen=True)
class LayerSubset:
    """Of the canonical tensors `whole`, those outside of layers and those of `layers`, numbered anew."""

    whole: TensorSource
    layers: tuple[int, ...]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the smaller model."""
        infos = self.whole.infos()
        return {name: infos[original] for name, original in self._names.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        return self.whole.read(self._names[name], rows)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names in the smaller model, with those in the whole one."""
        number = {layer: index for index, layer in enumerate(self.layers)}
        names = {}
        for original in self.whole.infos():
            match = _LAYER.search(original)
            if match is None:
                names[original] = original
            elif int(match[0]) in number:
                names[_LAYER.sub(str(number[int(match[0])]), original)] = original
        return names

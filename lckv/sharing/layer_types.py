"""The layer-type language: one string says whose keys and values every layer reads.

`0_6_6_6_6_6_6_7` has one entry per layer, joined by "_". Entry i is the index a(i) of the layer whose keys
and values layer i reads; an "s" behind it gives the layer a sliding window. The language is that of LCKV (Wu
and Tu, ACL 2024; its public code calls the entries layer types).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lckv.errors import Problem, SettingError

_ENTRY = re.compile(r"(\d+)(s?)")


@dataclass(frozen=True)
class LayerType:
    """What one layer reads."""

    index: int
    """Position of the layer, from 0 at the bottom."""

    source: int
    """a(i): the layer whose keys and values it reads."""

    sliding: bool
    """Whether it sees only a window."""

    @property
    def cyclic(self) -> bool:
        """Whether it reads a layer above itself, whose keys and values exist only after it has run."""
        return self.source > self.index


@dataclass(frozen=True)
class LayerTypes:
    """A sharing map: one `LayerType` per layer."""

    layers: tuple[LayerType, ...]

    @classmethod
    def plain(cls, num_layers: int) -> "LayerTypes":
        """The map of a plain transformer: every layer reads its own keys and values."""
        return cls(tuple(LayerType(index, index, False) for index in range(num_layers)))

    @classmethod
    def parse(cls, text: str | None, num_layers: int) -> "LayerTypes":
        """Read a map for `num_layers` layers; None is the plain map.

        Raises SettingError with the position of the entry that is wrong, the reason and the way out.
        """
        if text is None:
            return cls.plain(num_layers)
        entries = text.split("_")
        layers = []
        column = 1
        for index, entry in enumerate(entries):
            place = f"entry {index} (character {column})"
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise _misfit(
                    text,
                    f"{place} is {repr(entry) if entry else 'empty'}: an entry is the index of the layer to "
                    'read from, with an optional "s" for a sliding window, and entries are joined by "_"',
                )
            source = int(match[1])
            if source >= num_layers:
                raise _misfit(
                    text,
                    f"{place} reads layer {source}, but the model has {num_layers} layers, 0 to "
                    f"{num_layers - 1}",
                )
            layers.append(LayerType(index, source, bool(match[2])))
            column += len(entry) + 1
        if len(layers) != num_layers:
            raise _misfit(
                text,
                f"it has {len(layers)} entries but the model has {num_layers} layers: give one entry per "
                "layer",
            )
        return cls(tuple(layers))

    def __str__(self) -> str:
        return "_".join(f"{layer.source}{'s' if layer.sliding else ''}" for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerType]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> LayerType:
        return self.layers[index]

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers that compute keys and values, ascending: those that occur in the map.
        The others have no K/V weights."""
        return tuple(sorted({layer.source for layer in self.layers}))

    @property
    def any_cyclic(self) -> bool:
        """Whether some layer reads a layer above itself, so that training iterates."""
        return any(layer.cyclic for layer in self.layers)

    @cached_property
    def cyclic_sources(self) -> tuple[int, ...]:
        """Layers that a layer below them reads, ascending: their keys and values go from pass to pass."""
        return tuple(sorted({layer.source for layer in self.layers if layer.cyclic}))

    @property
    def any_sliding(self) -> bool:
        """Whether some layer sees only a window."""
        return any(layer.sliding for layer in self.layers)

    @cached_property
    def windowed_kv_layers(self) -> tuple[int, ...]:
        """Those of `kv_layers` that only layers with a window read,
        so that a cache need not keep more than the window."""
        sliding = {layer.index for layer in self.layers if layer.sliding}
        return tuple(layer for layer in self.kv_layers if sliding.issuperset(self.readers(layer)))

    def readers(self, source: int) -> tuple[int, ...]:
        """Layers that read the keys and values of layer `source`, ascending."""
        return tuple(layer.index for layer in self.layers if layer.source == source)


def _misfit(text: str, obstacle: str) -> SettingError:
    return SettingError([Problem("layer_types", repr(text), obstacle)])

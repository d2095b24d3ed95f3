"""The layer-type language: one string says whose keys and values every layer reads.

`0_6_6_6_6_6_6_7` has one entry per layer, joined by "_". Entry i is the index a(i) of the layer whose keys
and values layer i reads; an "s" behind it gives the layer a sliding window. The language is that of LCKV (Wu
and Tu, ACL 2024; its public code calls the entries layer types).

`0_1+0_2+0_2_2_2` has more: entry i may be `i+j` for a layer j below that computes keys and values, too. Layer
i then mixes those of layer j into its own (YOCO++; see docs/mixed_sources.md), and the mixture is what it
attends to, what a cache keeps of it, and what others read.

A layer without keys and values of its own may read two layers below it, i and j, that have some: `i+j` is a
learned mixture of both, and `i/j` the keys of layer i with the values of layer j.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lckv.errors import Problem, SettingError

_ENTRY = re.compile(r"(\d+)(?:([+/])(\d+))?(s?)")


@dataclass(frozen=True)
class LayerType:
    """What one layer reads."""

    index: int
    """Position of the layer, from 0 at the bottom."""

    source: int
    """a(i): the layer whose keys and values it reads."""

    sliding: bool
    """Whether it sees only a window."""

    mixes: int | None = None
    """The layer whose keys and values it mixes into those of `source`; None: none."""

    values: int | None = None
    """The layer whose values it reads; None: `source`."""

    @property
    def borrows(self) -> int | None:
        """The layer whose keys and values it mixes into its own; None: it does not, or has none."""
        return self.mixes if self.source == self.index else None

    @property
    def second(self) -> int | None:
        """The other layer that it reads, where it reads two; None: it reads one."""
        if self.values is not None:
            return self.values
        return self.mixes if self.source != self.index else None

    @property
    def sources(self) -> tuple[int, ...]:
        """The layers whose keys and values it reads."""
        return (self.source,) if self.second is None else (self.source, self.second)

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
                raise _misfit(text, f"{place} {_malformed(entry)}")
            source, other = int(match[1]), None if match[3] is None else int(match[3])
            if source >= num_layers:
                raise _misfit(
                    text,
                    f"{place} reads layer {source}, but the model has {num_layers} layers, 0 to "
                    f"{num_layers - 1}",
                )
            both = {} if match[2] is None else {"mixes" if match[2] == "+" else "values": other}
            layers.append(LayerType(index, source, bool(match[4]), **both))
            column += len(entry) + 1
        if len(layers) != num_layers:
            raise _misfit(
                text,
                f"it has {len(layers)} entries but the model has {num_layers} layers: give one entry per "
                "layer",
            )
        layer_types = cls(tuple(layers))
        for layer in layers:
            if obstacle := layer_types._obstacle_to_two(layer):
                raise _misfit(text, f"entry {layer.index} is {entries[layer.index]!r}, but {obstacle}")
        return layer_types

    def __str__(self) -> str:
        return "_".join(map(_entry, self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerType]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> LayerType:
        return self.layers[index]

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers that compute keys and values, ascending: those that occur in the map as the first, or only,
        one of an entry. The others have no K/V weights."""
        return tuple(sorted({layer.source for layer in self.layers if layer.values is None}))

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
        """Layers that read the keys or values of layer `source`, or both, ascending."""
        return tuple(layer.index for layer in self.layers if source in layer.sources)

    def first_readers(self, source: int) -> tuple[int, ...]:
        """Of these, layers that read both, alone or as those that another layer's are mixed into; none if
        `source` computes none."""
        return tuple(layer.index for layer in self.layers if layer.source == source and layer.values is None)

    def key_readers(self, source: int) -> tuple[int, ...]:
        """Layers that read the keys of layer `source`, what they mix into them left out, ascending."""
        return tuple(layer.index for layer in self.layers if layer.source == source)

    def value_readers(self, source: int) -> tuple[int, ...]:
        """The same of values."""
        return tuple(
            layer.index
            for layer in self.layers
            if (layer.source if layer.values is None else layer.values) == source
        )

    @cached_property
    def lenders(self) -> tuple[int, ...]:
        """Layers whose keys and values a layer above them mixes into its own, ascending."""
        return tuple(sorted({layer.borrows for layer in self.layers if layer.borrows is not None}))

    def mixers(self, lender: int) -> tuple[int, ...]:
        """Layers that mix the keys and values of layer `lender` into their own, ascending."""
        return tuple(layer.index for layer in self.layers if layer.borrows == lender)

    @property
    def any_mixed(self) -> bool:
        """Whether some layer has weights that mix keys and values."""
        return any(layer.mixes is not None for layer in self.layers)

    @cached_property
    def readers_of_two(self) -> tuple[int, ...]:
        """Layers that read two others, ascending."""
        return tuple(layer.index for layer in self.layers if layer.second is not None)

    @property
    def is_plain(self) -> bool:
        """Whether every layer has its own keys and values, and nothing of another one."""
        return all(layer.source == layer.index and layer.mixes is None for layer in self.layers)

    def _obstacle_to_two(self, layer: LayerType) -> str | None:
        """What is wrong with the second layer of an entry, if it has one."""
        if layer.values is not None and layer.source == layer.index:
            return (
                f"a layer that reads its own keys reads its own values, too: write {layer.index}, or "
                f"{layer.index}+{layer.values} to mix those of layer {layer.values} into its own"
            )
        if layer.mixes is None and layer.values is None:
            return None
        if layer.second == layer.source:
            return f"both are layer {layer.source}: write {layer.source}"
        for source in layer.sources if layer.borrows is None else (layer.borrows,):
            if source >= layer.index:
                return (
                    f"layer {source} is not below layer {layer.index}, and of two layers each must be: "
                    "choose a layer below"
                )
            if source not in self.kv_layers:
                owners = [str(owner) for owner in self.kv_layers if owner < layer.index]
                choice = f"choose a layer below that does, {', '.join(owners)}" if owners else "leave it out"
                return f"layer {source} computes no keys and values: {choice}"
        windowed = [source in self.windowed_kv_layers for source in layer.sources]
        if windowed[0] != windowed[-1]:
            few, all_of_them = layer.sources if windowed[0] else layer.sources[::-1]
            return (
                f"caches keep the window of layer {few} and every token of layer {all_of_them}: let layers "
                "with a window read both, or let one without read each"
            )
        return None


def _entry(layer: LayerType) -> str:
    mixes = "" if layer.mixes is None else f"+{layer.mixes}"
    values = "" if layer.values is None else f"/{layer.values}"
    return f"{layer.source}{mixes}{values}{'s' if layer.sliding else ''}"


def _malformed(entry: str) -> str:
    """What is wrong with an entry that is not of the language."""
    return (
        f"is {repr(entry) if entry else 'empty'}: an entry is the index of the layer to read from, with an "
        'optional "s" for a sliding window, or i+j for a mixture of the keys and values of layers i and j, '
        'or i/j for the keys of layer i and the values of layer j, and entries are joined by "_"'
    )


def _misfit(text: str, obstacle: str) -> SettingError:
    return SettingError([Problem("layer_types", repr(text), obstacle)])

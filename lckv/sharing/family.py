"""A family of sharing maps: one training in which each step draws its map, and of which each map can be
exported afterwards.

A family is written in one of two ways.

    0_0|1_1|2_2|3              alternatives, joined by "|": each layer draws one of its own, independently and
                               uniformly
    [0_1_2_3, 0_0_2_2]         maps, of which one is drawn uniformly

A layer that draws an alternative which itself reads elsewhere in the same draw reads what that one reads: of
0_0|1_1|2_2|3 the draw 0, 0, 1, 3 is the map 0_0_0_3. So a chain ends at a layer that reads its own keys and
values, and alternatives must not run in a circle. (Each layer its own or a preceding layer's: Stochastic KV
Routing, Filippova et al., 2026.) Maps of a list, and a map that is no family, mean what they always do: `1`
is the keys and values that layer 1 computes, whatever layer 1 itself reads.

The draw is a function of a seed and of the number of the step: there is no generator whose state could be
lost.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod

from lckv.errors import Problem, SettingError
from lckv.sharing.layer_types import LayerType, LayerTypes

_ALTERNATIVE = re.compile(r"(\d+)(s?)")
_ENUMERATED = 256
"""Draws up to which all are looked at."""
_DRAWN = 64
"""Draws that stand for those of a larger family."""
Written = str | Sequence[str] | None
"""How `compression.layer_types` may be given; None: the plain map."""


@dataclass(frozen=True)
class LayerTypesFamily:
    """One map, several, or one for each choice of alternatives."""

    maps: tuple[LayerTypes, ...]
    """Those of a list; none where there are alternatives."""

    alternatives: tuple[tuple[LayerType, ...], ...] = ()
    """Of each layer; none where maps are listed."""

    @classmethod
    def parse(cls, written: Written, num_layers: int) -> "LayerTypesFamily":
        """Read a family for `num_layers` layers. A text in square brackets is a list.

        Raises SettingError with what is wrong and the way out.
        """
        if isinstance(written, str) and written.lstrip().startswith("["):
            written = _texts_of_list(written)
        if written is None or (isinstance(written, str) and "|" not in written):
            return cls((LayerTypes.parse(written, num_layers),))
        if isinstance(written, str):
            return cls((), _read_alternatives(written, num_layers))
        return cls(_read_list(written, num_layers))

    def __str__(self) -> str:
        if self.alternatives:
            return "_".join("|".join(map(_entry, layer)) for layer in self.alternatives)
        return str(self.maps[0]) if len(self.maps) == 1 else f"[{', '.join(map(str, self.maps))}]"

    def __len__(self) -> int:
        """Layers of a map."""
        return len(self.alternatives or self.maps[0])

    @property
    def only(self) -> LayerTypes | None:
        """The map, where there is but one; None: a family."""
        return self.maps[0] if len(self.maps) == 1 else None

    @property
    def number_of_draws(self) -> int:
        """Different draws; several of alternatives may come to one map."""
        return prod(map(len, self.alternatives)) if self.alternatives else len(self.maps)

    def draw(self, seed: int, iteration: int) -> LayerTypes:
        """The map of step `iteration`, from 0: the same in every process, and in a run that goes on."""
        if not self.alternatives:
            return self.maps[_uniform(len(self.maps), seed, iteration)]
        return _resolved(
            [
                choices[_uniform(len(choices), seed, iteration, layer)]
                for layer, choices in enumerate(self.alternatives)
            ]
        )

    def __contains__(self, layer_types: LayerTypes) -> bool:
        """Whether `layer_types` can be drawn."""
        if not self.alternatives:
            return layer_types in self.maps
        sources = [layer.source for layer in layer_types]

        def may_be(layer: LayerType) -> bool:
            return (layer.mixes, layer.values) == (None, None) and any(
                choice.sliding == layer.sliding
                and (sources[choice.source] if choice.source != layer.index else layer.index) == layer.source
                for choice in self.alternatives[layer.index]
            )

        return len(layer_types) == len(self) and all(map(may_be, layer_types))

    @property
    def first(self) -> LayerTypes:
        """The first map of a list; of alternatives the map in which each layer draws its first one."""
        return _resolved([layer[0] for layer in self.alternatives]) if self.alternatives else self.maps[0]

    @property
    def is_enumerated(self) -> bool:
        """Whether `weights` has all maps."""
        return self.number_of_draws <= _ENUMERATED

    @cached_property
    def weights(self) -> Mapping[LayerTypes, float]:
        """How likely each map is, the sum being 1. Exact up to 256 different draws, and then `first` comes
        first; beyond that the shares of 64 fixed draws, an estimate."""
        if not self.alternatives:
            return dict.fromkeys(self.maps, 1 / len(self.maps))
        if self.is_enumerated:
            drawn = Counter(map(_resolved, product(*self.alternatives)))
        else:
            drawn = Counter(self.draw(0, number) for number in range(_DRAWN))
        return {layer_types: number / drawn.total() for layer_types, number in drawn.items()}

    @cached_property
    def stored(self) -> LayerTypes:
        """A map in which exactly those layers compute keys and values that do so in some map of the family:
        these have weights for them. No layer of it has a window. Of one map that map itself."""
        if self.only is not None:
            return self.only
        owners = self._owners
        return LayerTypes(
            tuple(
                LayerType(layer.index, layer.index if layer.index in owners else layer.source, False)
                for layer in self.first
            )
        )

    @property
    def _owners(self) -> set[int]:
        """Of alternatives, a layer that can draw itself computes keys and values whenever it does."""
        if not self.alternatives:
            return {layer for layer_types in self.maps for layer in layer_types.kv_layers}
        return {layer for layer, choices in enumerate(self.alternatives) if layer in _sources(choices)}

    @property
    def any_cyclic(self) -> bool:
        """Whether in some map a layer reads a layer above itself, as far as single entries tell."""
        return any(layer.source > layer.index for layers in self._entries() for layer in layers)

    @property
    def any_sliding(self) -> bool:
        """Whether in some map a layer sees only a window."""
        return any(layer.sliding for layers in self._entries() for layer in layers)

    @property
    def any_sharing(self) -> bool:
        """Whether in some map a layer reads the keys and values of another."""
        return bool(self.shared_layers)

    @property
    def shared_layers(self) -> set[int]:
        """Layers whose keys and values another layer reads in some map, as far as single entries tell."""
        entries = (layer for layers in self._entries() for layer in layers)
        return {source for layer in entries for source in layer.sources if source != layer.index}

    def _entries(self) -> Sequence[Sequence[LayerType]]:
        return self.alternatives or [layer_types.layers for layer_types in self.maps]


def _texts_of_list(text: str) -> list[str]:
    inner = text.strip().removeprefix("[")
    if not inner.endswith("]"):
        raise _misfit(text, "it begins with a bracket, as a list of maps, and does not end with one: add ']'")
    inner = inner.removesuffix("]")
    return [one.strip() for one in inner.split(",")] if inner.strip() else []


def _read_list(texts: Sequence[str], num_layers: int) -> tuple[LayerTypes, ...]:
    if not texts:
        raise _misfit("[]", "the list is empty: give at least one map, or null for a plain model")
    for text in texts:
        if not isinstance(text, str):
            raise _misfit(
                str(text), "it stands in the list and is no text: give sharing maps, such as 0_0_2_2"
            )
        if "|" in text:
            raise _misfit(
                text,
                "it has alternatives and stands in a list: give either a list of maps, or one text with "
                "alternatives",
            )
        _refuse_mixed(text)
    maps = tuple(LayerTypes.parse(text, num_layers) for text in texts)
    twice = next((layer_types for layer_types in maps if maps.count(layer_types) > 1), None)
    if twice is not None:
        raise _misfit(
            str(twice), "it stands in the list more than once, and all are equally likely: leave one"
        )
    return maps


def _read_alternatives(text: str, num_layers: int) -> tuple[tuple[LayerType, ...], ...]:
    _refuse_mixed(text)
    entries = text.split("_")
    if len(entries) != num_layers:
        raise _misfit(
            text,
            f"it has {len(entries)} entries but the model has {num_layers} layers: give one entry per layer",
        )
    alternatives = tuple(
        tuple(_read_alternative(text, index, one, num_layers) for one in entry.split("|"))
        for index, entry in enumerate(entries)
    )
    for index, choices in enumerate(alternatives):
        if len(set(choices)) < len(choices):
            raise _misfit(
                text,
                f"entry {index} is {entries[index]!r}: it has an alternative twice, and all are equally "
                "likely: leave one",
            )
    _refuse_circles(text, alternatives)
    return alternatives


def _read_alternative(text: str, index: int, alternative: str, num_layers: int) -> LayerType:
    match = _ALTERNATIVE.fullmatch(alternative)
    if match is None:
        raise _misfit(
            text,
            f"entry {index} has the alternative {repr(alternative) if alternative else 'without a text'}: an "
            'alternative is the index of the layer to read from, with an optional "s" for a sliding window, '
            'and alternatives are joined by "|"',
        )
    if int(match[1]) >= num_layers:
        raise _misfit(
            text,
            f"entry {index} may read layer {match[1]}, but the model has {num_layers} layers, 0 to "
            f"{num_layers - 1}",
        )
    return LayerType(index, int(match[1]), bool(match[2]))


def _refuse_mixed(text: str) -> None:
    if "+" in text or "/" in text:
        raise _misfit(text, "a family has no entries of two layers ('+' or '/'): train such a map by itself")


def _refuse_circles(text: str, alternatives: Sequence[Sequence[LayerType]]) -> None:
    """Where layers could draw each other none of them would compute keys and values."""
    left = {index: _sources(choices) - {index} for index, choices in enumerate(alternatives)}
    while free := [index for index, sources in left.items() if not sources & left.keys()]:
        for index in free:
            del left[index]
    if left:
        raise _misfit(
            text,
            f"layers {', '.join(map(str, left))} can draw each other in a circle, so that none of them "
            "computes the keys and values: let alternatives name lower layers, or layers that always read "
            "their own",
        )


def _sources(choices: Sequence[LayerType]) -> set[int]:
    return {choice.source for choice in choices}


def _resolved(chosen: Sequence[LayerType]) -> LayerTypes:
    """The map of one alternative for each layer, with chains followed to their ends."""

    def end(index: int) -> int:
        while chosen[index].source != index:
            index = chosen[index].source
        return index

    return LayerTypes(tuple(replace(layer, source=end(layer.index)) for layer in chosen))


def _entry(layer: LayerType) -> str:
    return f"{layer.source}{'s' if layer.sliding else ''}"


def _uniform(number: int, *key: int) -> int:
    """One of 0 .. number - 1, from `key` alone."""
    digest = hashlib.blake2b(repr(("layer types", *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % number


def _misfit(text: str, obstacle: str) -> SettingError:
    return SettingError([Problem("layer_types", repr(text), obstacle)])

"""Sharing maps with a name, for any number of layers, and when to choose which."""

from collections.abc import Callable
from dataclasses import dataclass

YOCO_WINDOW = 1024
"""Tokens that a sliding layer sees where a run gives no compression.sliding_window."""


@dataclass(frozen=True)
class Layout:
    """A family of sharing maps."""

    name: str

    entry: Callable[[int, int], str]
    """(index of a layer, number of layers) to the layer's entry in compression.layer_types."""

    when: str
    """When to choose it."""

    def layer_types(self, num_layers: int) -> str:
        """Its map for so many layers."""
        return "_".join(self.entry(index, num_layers) for index in range(num_layers))


def _cla(index: int, num_layers: int) -> str:
    return str(index - index % 2)


def _yoco(index: int, num_layers: int) -> str:
    return f"{index}s" if index < num_layers // 2 else str(num_layers // 2)


def _lckv(index: int, num_layers: int) -> str:
    return str(index if index in (0, num_layers - 1) else num_layers - 2)


def _sandwich_middle(index: int, num_layers: int) -> str:
    return str(index if index in (0, num_layers - 1) else (num_layers - 1) // 2)


LAYOUTS = (
    Layout("plain", lambda index, _: str(index), "the reference: the largest cache, the best studied quality"),
    Layout("CLA", _cla, "half the cache is enough: trains and pipelines like a plain model"),
    Layout("YOCO", _yoco, "long contexts: one layer's cache grows with them, the others keep their window only"),
    Layout("LCKV (w=2)", _lckv, "the smallest cache, with queries that see the top of the model: dearest to train"),
    Layout(
        "sandwich-middle", _sandwich_middle, "the same cache as LCKV where training time matters: fewer layers iterate"
    ),
)
"""From the largest cache to the smallest."""

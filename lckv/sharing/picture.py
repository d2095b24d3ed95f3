"""A sharing map as text: which layers compute keys and values, which read them, and which run again."""

from lckv.sharing.layer_types import LayerType, LayerTypes
from lckv.sharing.plan import layer_groups


def draw(layer_types: LayerTypes, *, window: int | None = None) -> str:
    """One line per layer, the top layer first.

    `KV` marks a layer that computes keys and values, `<-` what it reads, and the bracket the layers that run
    again and again because one of them reads a layer above itself.
    """
    groups = [group for group in layer_groups(layer_types) if group.iterated]
    brackets = {}
    for group in groups:
        for index in range(group.start, group.stop):
            corner = "┐" if index == group.stop - 1 else "┘" if index == group.start else "│"
            brackets[index] = " " + corner
        if group.stop - group.start > 1:
            brackets[group.stop - 1] += " iterated"
    width = len(str(len(layer_types) - 1))
    lines = []
    for layer in reversed(layer_types.layers):
        own = "KV" if layer.index in layer_types.kv_layers else "  "
        line = (
            f"layer {layer.index:>{width}}  {own}  <- "
            f"{_reads(layer, width, window)}{brackets.get(layer.index, '')}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def _reads(layer: LayerType, width: int, window: int | None) -> str:
    where = (
        "own" if layer.source == layer.index else f"{layer.source:>{width}} {'↑' if layer.cyclic else '↓'}"
    )
    seen = f" window {window}" if layer.sliding and window else " window" if layer.sliding else ""
    return f"{where:<{width + 4}}{seen}"

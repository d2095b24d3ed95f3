"""Sharing maps with a name, for any number of layers, and which to choose when."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lckv.config import CompressionConfig
from lckv.cost import ModelShape, kv_bytes_per_token, prompt_cost, training_cost
from lckv.sharing.layer_types import LayerTypes
from lckv_megatron.tables import gib, table

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
    Layout(
        "plain", lambda index, _: str(index), "the reference: the largest cache, the best studied quality"
    ),
    Layout("CLA", _cla, "half the cache is enough: trains and pipelines like a plain model"),
    Layout(
        "YOCO", _yoco, "long contexts: one layer's cache grows with them, the others keep their window only"
    ),
    Layout("LCKV (w=2)", _lckv, "the smallest cache, made near the top of the model: dearest to train"),
    Layout(
        "sandwich-middle",
        _sandwich_middle,
        "a cache as small, for less training: only the layers below the middle iterate",
    ),
)
"""The plain map first, the smallest caches last."""


def cache_bytes(shape: ModelShape, layer_types: LayerTypes, *, window: int | None, tokens: int) -> int:
    """KV cache in 16 bits of a context of `tokens`; keys and values that only sliding layers read are kept
    for the window."""
    per_layer = kv_bytes_per_token(shape, layer_types) // len(layer_types.kv_layers)
    kept = 0
    for source in layer_types.kv_layers:
        kept += min(window, tokens) if window and source in layer_types.windowed_kv_layers else tokens
    return per_layer * kept


def compare(
    shape: ModelShape, compression: CompressionConfig, context: int, maps: Sequence[str]
) -> Iterator[str]:
    """A table of a model with other maps, each the name of a layout or a map as in compression.layer_types
    (default: all layouts).

    `context`: tokens of a full context. Raises ValueError for what is neither a name nor a map.
    """
    window = compression.sliding_window or YOCO_WINDOW
    known = {layout.name.split()[0].lower(): layout for layout in LAYOUTS}
    rows: list[tuple[str, ...]] = [
        ("map", "KV layers", "KV bytes/token", f"{context:,} tokens", "step cost", "prompt cost", "when")
    ]
    legend = []
    for number, entry in enumerate(maps or known, 1):
        layout = known.get(entry.lower())
        name, when = (layout.name, layout.when) if layout else (f"map {number}", "")
        text = layout.layer_types(shape.num_layers) if layout else entry
        layer_types = LayerTypes.parse(text, shape.num_layers)
        with_map = replace(
            compression, layer_types=text, sliding_window=window if layer_types.any_sliding else None
        )
        rows.append((name, *_compared(shape, with_map, context), when))
        legend.append(f"{name:<16} {layer_types}")
    yield from table(rows)
    yield (
        f"Sliding layers see {window:,} tokens, cyclic groups run {compression.forward_passes} + "
        f"{compression.backward_passes} passes. "
        f"step cost, and prompt cost of {shape.seq_length:,} tokens: relative to a plain model."
    )
    yield from legend


def _compared(shape: ModelShape, compression: CompressionConfig, context: int) -> tuple[str, ...]:
    layer_types = compression.map(shape.num_layers)
    return (
        str(len(layer_types.kv_layers)),
        f"{kv_bytes_per_token(shape, layer_types):,}",
        gib(cache_bytes(shape, layer_types, window=compression.sliding_window, tokens=context)),
        f"{training_cost(shape, compression).ratio:.2f}x",
        f"{prompt_cost(shape, compression).ratio:.2f}x",
    )

"""A sharing map as text: which layers compute keys and values, which read them,
and which run again in which steps."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from lckv.sharing.layer_types import LayerType, LayerTypes
from lckv.sharing.plan import Part, Step, layer_groups


def draw(layer_types: LayerTypes, *, window: int | None = None) -> str:
    """One line per layer, the top layer first.

    `KV` marks a layer that computes keys and values, `<-` what it reads: `+` joins layers whose keys and
    values are mixed, `/` the layer of the keys and that of the values. The bracket marks the layers that run
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
    column = max([width + 4, *(len(_source(layer, width)) + 1 for layer in layer_types)])
    lines = []
    for layer in reversed(layer_types.layers):
        own = "KV" if layer.index in layer_types.kv_layers else "  "
        line = (
            f"layer {layer.index:>{width}}  {own}  <- "
            f"{_reads(layer, width, column, window)}{brackets.get(layer.index, '')}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def _reads(layer: LayerType, width: int, column: int, window: int | None) -> str:
    seen = f" window {window}" if layer.sliding and window else " window" if layer.sliding else ""
    return f"{_source(layer, width):<{column}}{seen}"


def _source(layer: LayerType, width: int) -> str:
    if layer.source == layer.index:
        return "own" if layer.mixes is None else f"own + {layer.mixes:>{width}}"
    if layer.second is None:
        return f"{layer.source:>{width}} {'↑' if layer.cyclic else '↓'}"
    return f"{layer.source:>{width}} {'+' if layer.values is None else '/'} {layer.second:>{width}} ↓"


def list_steps(steps: Sequence[Step]) -> Iterator[str]:
    """The steps of a plan in order, from the lowest layers; passes that do the same share a line."""
    passes = {step.group: step.number + 1 for step in steps}
    for (group, does), alike in groupby(steps, lambda step: (step.group, _does(step))):
        numbers = [step.number + 1 for step in alike]
        layers = f"layer{_span(range(group.start, group.stop))}"
        if not group.iterated:
            yield f"{layers}, {does}"
        else:
            yield f"{layers}, pass{_span(numbers, plural='es')} of {passes[group]}, {does}"


def _does(step: Step) -> str:
    """What a pass does, apart from its number."""
    if not step.group.iterated:
        return "once"
    without = [run.index for run in step.runs if run.part is Part.WITHOUT_SOURCE]
    kept = f"for the next pass: KV of {', '.join(map(str, step.hands))}"
    return f"{'with' if step.requires_grad else 'without'} gradient, {'counts' if step.update else kept}" + (
        f"; layer{_span(without)} without attention" if without else ""
    )


def _span(numbers: Iterable[int], *, plural: str = "s") -> str:
    """Ascending numbers with runs joined, such as "s 1-4, 6"; begins with the plural's ending if needed."""
    numbers = list(numbers)
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = spans[-1][0], number
        else:
            spans.append((number, number))
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    return f"{plural if len(numbers) > 1 else ''} {text}"

"""Which layers each pipeline stage has. Neither torch nor Megatron is loaded.

A stage has one stretch of layers, or with interleaving several: stretch i belongs to stage i modulo the
number of stages. `parallel.pipeline_model_parallel_layout` is empty (equally many layers), Megatron's
notation, or `auto`: the stretches whose most expensive one is cheapest, by the operations of all passes, and
of the output layer in the last.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lckv.config import CompressionConfig
from lckv.cost import LayerCost, forward_flops, layer_costs
from lckv.sharing.journey import Journey, Visit, journey
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape

AUTO = "auto"
_GROUP = re.compile(r"\(([^()]*)\)(?:\*(\d+))?")
_REPEATED = re.compile(r"([EtL])\*(\d+)")


@dataclass(frozen=True)
class Placement:
    """The layers of all stages."""

    chunks: tuple[range, ...]
    """Stretches of layers, from the bottom."""

    stages: int

    costs: tuple[LayerCost, ...]
    """Of each layer."""

    head: float
    """FLOPs per token of the output layer's forward."""

    @property
    def is_even(self) -> bool:
        """Whether each stage has one stretch, and all have equally many layers."""
        return len(self.chunks) == self.stages and len(set(map(len, self.chunks))) == 1

    def of_stage(self, stage: int) -> tuple[range, ...]:
        """The stretches of one stage."""
        return self.chunks[stage :: self.stages]

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """The layers of one stage, from the bottom."""
        return tuple(layer for chunk in self.of_stage(stage) for layer in chunk)

    def journey(self, compression: CompressionConfig) -> Journey:
        """The way of a micro-batch."""
        return journey(compression.plan(self.chunks[-1].stop), self.chunks, self.stages)

    def in_flight(self, compression: CompressionConfig, asked: int | None) -> int:
        """Micro-batches that are between forward and backward at once, at most; `asked`:
        `parallel.pipeline_in_flight`."""
        way = self.journey(compression)
        return self.in_flight_on(way, asked) if way.circulates else self.stages

    def in_flight_on(self, way: Journey, asked: int | None) -> int:
        """The same on a way that comes to a stage several times."""
        return asked or self.stages * (1 if way.prepare else 2)

    def cost(self, visit: Visit) -> float:
        """FLOPs per token of a visit's forward."""
        leaves = self.head if visit.sends is None and visit.steps else 0.0
        return forward_flops(visit.steps, self.costs) + leaves


def place(
    model: ModelConfig,
    compression: CompressionConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    seq_length: int,
) -> Placement:
    """The placement of a run; `vocab_size` and `seq_length` weigh for `auto`. Raises ConfigError."""
    shape = model_shape(model, vocab_size=vocab_size, seq_length=seq_length)
    costs, head = layer_costs(shape, compression), 2.0 * shape.hidden_size * shape.vocab_size
    number = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    layout = parallel.pipeline_model_parallel_layout
    if layout == AUTO:
        maps = compression.maps(model.num_layers).items()
        weights = [
            sum(
                share * costs[run.index].of(run.part) * (3 if step.requires_grad else 1)
                for one, share in maps
                for step in one.plan(model.num_layers)
                for run in step.runs
                if run.index == layer
            )
            for layer in range(model.num_layers)
        ]
        counts = _balanced(weights, 3 * head, number)
    elif layout is not None:
        counts = read_layout(layout, number, model.num_layers)
    else:
        counts = [model.num_layers // number] * number
    bounds = accumulate(counts, initial=0)
    chunks = tuple(range(start, stop) for start, stop in pairwise(bounds))
    return Placement(chunks, parallel.pipeline_model_parallel_size, costs, head)


def read_layout(layout: str, chunks: int, num_layers: int) -> list[int]:
    """Layers of each stretch, from Megatron's notation: `E` embedding, `t` layer, `L` output layer, `|`
    between stretches, `x*3` and `(...)*3` repeated; commas are ignored. Raises ConfigError."""
    name = f"parallel.pipeline_model_parallel_layout is {layout!r}"
    parts = _expanded(layout).split("|")
    if re.search(r"[^EtL|]", "".join(parts)):
        raise ConfigError(
            f"{name}; it has E, t, L, |, * and brackets, as in 'Et*3|(tt|)*2,t*2L', or is {AUTO}."
        )
    if len(parts) != chunks:
        raise ConfigError(
            f"{name}, which has {len(parts)} parts between |; it needs {chunks}: "
            "parallel.pipeline_model_parallel_size times virtual_pipeline_model_parallel_size."
        )
    whole = "".join(parts)
    if whole != "E" + "t" * num_layers + "L":
        raise ConfigError(
            f"{name}, which is {whole.count('E')} E, {whole.count('t')} t and {whole.count('L')} L; it needs "
            f"one E at the beginning, {num_layers} t (model.num_layers) and one L at the end."
        )
    counts = [part.count("t") for part in parts]
    if 0 in counts:
        raise ConfigError(f"{name}; part {counts.index(0)} has no layer (t), and every part needs one.")
    return counts


def _expanded(layout: str) -> str:
    """Without repetitions, commas and spaces."""
    text = re.sub(r"[\s,]", "", layout)
    while match := _GROUP.search(text):
        text = text[: match.start()] + match[1] * int(match[2] or 1) + text[match.end() :]
    return _REPEATED.sub(lambda match: match[1] * int(match[2]), text)


def _balanced(weights: Sequence[float], last: float, number: int) -> list[int]:
    """Lengths of `number` stretches of `weights` whose heaviest is lightest; `last` weighs in the last."""
    total = len(weights)
    if number > total:
        return [total // number] * number  # refused elsewhere
    sums = list(accumulate(weights, initial=0.0))
    # best[i]: heaviest stretch and bounds, of the cheapest way to cut the first i layers
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for piece in range(1, number + 1):
        extra = last if piece == number else 0.0
        ends: Iterator[int] = iter([total] if piece == number else range(piece, total - number + piece + 1))
        best = {
            end: min(
                (max(heaviest, sums[end] - sums[start] + extra), (*bounds, end))
                for start, (heaviest, bounds) in best.items()
                if start < end
            )
            for end in ends
        }
    return [stop - start for start, stop in pairwise(best[total][1])]

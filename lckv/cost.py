"""What a sharing map costs and saves: operations of training and of prompts, bytes of KV cache.

Formula, per token, counting a multiplication and an addition as 2 FLOPs. A layer's forward is
    query 2 h a + output 2 a h + keys and values 2 h 2 g d (if it computes any) + attention 4 a n + MLP 6 h f
with h hidden size, a = query heads x d, g KV heads, d channels of a head, f MLP width, n keys that a query
sees on average. What is done to numbers one by one (norms, RoPE, mixing keys and values) is not counted.
Backward is twice the forward; where weights are not trained, that of everything but attention is the forward
once. A step of the plan counts the parts of layers that it runs: forward and
backward, or the forward only where it has no gradient. Of a prompt whose last token alone has logits, the
steps are those of `lckv.sharing.early_exit`. A first guess costs what keys and values of its layer do, and in
backward the same once more, since no gradient goes on from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from lckv.config import CompressionConfig
from lckv.sharing.early_exit import Results, exit_early
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import Part, Step, iteration_plan


@dataclass(frozen=True)
class ModelShape:
    """The sizes that costs depend on."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    """As computed with, padding included."""
    seq_length: int
    """Tokens of a training sequence, or of a prompt."""


@dataclass(frozen=True)
class LayerCost:
    """FLOPs per token of one layer's forward."""

    query_and_output: float
    keys_values: float
    attention: float
    feed_forward: float
    newest_attention: float
    """Of the last token, not the average one."""

    @property
    def forward(self) -> float:
        """All of it."""
        return self.of(Part.WHOLE)

    def of(self, part: Part) -> float:
        """What a step of the plan runs of it for each token; of WANTED, for those that are not wanted."""
        if part is Part.NOTHING:
            return 0.0
        if part in (Part.KEYS_VALUES, Part.WANTED):
            return self.keys_values
        if part is Part.WITHOUT_SOURCE:
            return self.keys_values + self.feed_forward
        return self.query_and_output + self.keys_values + self.attention + self.feed_forward

    def weight_gradients(self, part: Part) -> float:
        """What the gradients of weights cost of `part` in backward."""
        return self.of(part) - (self.attention if part is Part.WHOLE else 0.0)

    @property
    def wanted(self) -> float:
        """What a step runs for the last token alone where it is the wanted one, besides `of`."""
        return self.query_and_output + self.newest_attention + self.feed_forward


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs per token of one training step."""

    model_flops: float
    """What the method asks for: every pass of the plan, K/V projections only
    where a layer has them; no recomputation."""

    hardware_flops: float
    """model_flops and the forward of layers recomputed in backward."""

    plain_flops: float
    """A plain model of the same sizes, without recomputation."""

    @property
    def ratio(self) -> float:
        """Predicted time of a step relative to the plain model of the same sizes."""
        return self.model_flops / self.plain_flops

    def plus(self, flops: float) -> "TrainingCost":
        """With so many more that the method asks for, as of a teacher that reads the same tokens."""
        return TrainingCost(self.model_flops + flops, self.hardware_flops + flops, self.plain_flops)


@dataclass(frozen=True)
class PromptCost:
    """FLOPs of a prompt up to the logits of its last token."""

    flops: float

    plain_flops: float
    """A plain model of the same sizes."""

    @property
    def ratio(self) -> float:
        """Predicted time relative to the plain model of the same sizes."""
        return self.flops / self.plain_flops


def average_keys(seq_length: int, *, exclude_self: bool, window: int | None) -> float:
    """n: keys that a query of a row of `seq_length` tokens sees on average."""
    seen = min(window or seq_length, seq_length) - exclude_self
    rows = seq_length - exclude_self
    growing = min(seen, rows)
    return (growing * (growing + 1) / 2 + (rows - growing) * seen) / seq_length


def layer_costs(shape: ModelShape, compression: CompressionConfig) -> tuple[LayerCost, ...]:
    """The forward of each layer; of a family of maps the mean over them."""
    maps = compression.maps(shape.num_layers)
    if len(maps) == 1:
        return _layer_costs(shape, *maps)
    names = [entry.name for entry in fields(LayerCost)]
    of_maps = [(share, _layer_costs(shape, one)) for one, share in maps.items()]
    return tuple(
        LayerCost(
            **{name: sum(share * getattr(costs[layer], name) for share, costs in of_maps) for name in names}
        )
        for layer in range(shape.num_layers)
    )


def _layer_costs(shape: ModelShape, compression: CompressionConfig) -> tuple[LayerCost, ...]:
    """With one map."""
    layer_types = compression.map(shape.num_layers)
    width = shape.query_heads * shape.head_dim
    costs = []
    for layer in layer_types:
        sight = compression.sight(layer)
        keys = average_keys(shape.seq_length, **sight._asdict())
        newest_keys = min(sight.window or shape.seq_length, shape.seq_length) - sight.exclude_self
        owns = layer.index in layer_types.kv_layers
        costs.append(
            LayerCost(
                query_and_output=4.0 * shape.hidden_size * width,
                keys_values=4.0 * shape.hidden_size * shape.kv_heads * shape.head_dim * owns,
                attention=4.0 * width * keys,
                feed_forward=6.0 * shape.hidden_size * shape.ffn_size,
                newest_attention=4.0 * width * newest_keys,
            )
        )
    return tuple(costs)


def training_cost(
    shape: ModelShape,
    compression: CompressionConfig,
    *,
    recomputed_layers: int = 0,
    trains_weights: bool = True,
) -> TrainingCost:
    """FLOPs per token of a training step, of a family of maps the mean over them; the lowest
    `recomputed_layers` layers run their forward again in backward. `trains_weights`: whether there are
    gradients of weights, those of a KV policy's own not counted."""
    maps = compression.maps(shape.num_layers)
    mine = sum(
        share * (_step_flops(shape, one) - (0.0 if trains_weights else _weight_gradient_flops(shape, one)))
        for one, share in maps.items()
    )
    again = sum(share * _recomputed_flops(shape, one, recomputed_layers) for one, share in maps.items())
    return TrainingCost(mine, mine + again, _step_flops(shape, CompressionConfig()))


def reading_cost(shape: ModelShape, compression: CompressionConfig) -> float:
    """FLOPs per token of a forward without gradient that gives every token's logits: all passes of the plan,
    as a teacher reads what its student learns from."""
    costs = layer_costs(shape, compression)
    steps = compression.plan(shape.num_layers)
    return forward_flops(steps, costs) + 2.0 * shape.hidden_size * shape.vocab_size


def prompt_cost(
    shape: ModelShape,
    compression: CompressionConfig,
    *,
    passes: int | None = None,
    results: Results = Results.SOME,
) -> PromptCost:
    """FLOPs of a prompt of `shape.seq_length` tokens, of which the last one's logits are wanted (SOME), or
    none; ALL: every layer runs for every token. `passes` over iterated layers, default m + b."""
    passes = compression.forward_passes + compression.backward_passes if passes is None else passes
    return PromptCost(
        _prompt_flops(shape, compression, passes, results),
        _prompt_flops(shape, CompressionConfig(), 1, results),
    )


def forward_flops(steps: Sequence[Step], costs: Sequence[LayerCost]) -> float:
    """FLOPs per token of the forward of some steps, for layers that cost `costs`."""
    return sum(costs[run.index].of(run.part) for step in steps for run in step.runs) + guess_flops(
        steps, costs
    )


def guess_flops(steps: Sequence[Step], costs: Sequence[LayerCost]) -> float:
    """FLOPs per token of the first guesses that some steps read."""
    return sum(costs[source].keys_values for step in steps for source in step.guesses)


def _step_flops(shape: ModelShape, compression: CompressionConfig) -> float:
    """Of a training step without recomputation, the language-model head included."""
    costs = layer_costs(shape, compression)
    head = 6.0 * shape.hidden_size * shape.vocab_size
    steps = compression.plan(shape.num_layers)
    # of a first guess: forward, and the gradient of its weights
    guesses = guess_flops(steps, costs)
    passes = sum(
        (forward_flops([step], costs) - guess_flops([step], costs)) * (3 if step.requires_grad else 1)
        for step in steps
    )
    return head + passes + 2 * guesses


def _weight_gradient_flops(shape: ModelShape, compression: CompressionConfig) -> float:
    """What gradients of weights take of `_step_flops`."""
    costs = layer_costs(shape, compression)
    steps = compression.plan(shape.num_layers)
    of_layers = sum(
        costs[run.index].weight_gradients(run.part)
        for step in steps
        if step.requires_grad
        for run in step.runs
    )
    return 2.0 * shape.hidden_size * shape.vocab_size + of_layers + guess_flops(steps, costs)


def _prompt_flops(shape: ModelShape, compression: CompressionConfig, passes: int, results: Results) -> float:
    """Of a prompt; the language-model head runs for its last token, if that is wanted."""
    costs = layer_costs(shape, compression)
    layer_types = compression.map(shape.num_layers)
    steps = iteration_plan(layer_types, passes - 1, 1, first_guess=compression.first_guess)
    steps = exit_early(steps, results)
    wanted = sum(costs[run.index].wanted for step in steps for run in step.runs if run.part is Part.WANTED)
    head = 0.0 if results is Results.NONE else 2.0 * shape.hidden_size * shape.vocab_size
    return forward_flops(steps, costs) * shape.seq_length + wanted + head


def _recomputed_flops(shape: ModelShape, compression: CompressionConfig, recomputed_layers: int) -> float:
    """Of the layers that run again in backward: those that ran whole, with gradient."""
    costs = layer_costs(shape, compression)
    return sum(
        costs[run.index].forward
        for step in compression.plan(shape.num_layers)
        for run in step.runs
        if step.requires_grad and run.part is Part.WHOLE and run.index < recomputed_layers
    )


def kv_bytes_per_token(shape: ModelShape, layer_types: LayerTypes, *, bytes_per_number: int = 2) -> int:
    """KV cache of one token of context: keys and values of the layers that compute them."""
    return len(layer_types.kv_layers) * 2 * shape.kv_heads * shape.head_dim * bytes_per_number

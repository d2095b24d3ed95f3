"""What a training run keeps in a rank's memory, predicted without building the model. Neither torch nor
Megatron is loaded.

State, in bytes per parameter of the rank (DP data-parallel ranks share the optimizer's where it is distributed):
    bf16: weights 2, gradients 4, optimizer 12 (float32 weights and two moments)      fp32: weights 4, gradients 4, optimizer 8

Activations that full recompute keeps for backward, for one micro-batch of b rows of s tokens:
    inputs x s b h / T   +   shared x 2 s b g d
with h hidden size, g KV heads of the rank, d channels of a head, T tensor-parallel ranks with sequence parallelism, else 1.
`inputs` is the number of layers, where a layer counts once for every pass with gradient; `shared` the number of distinct keys and
values that some layer reads from another: each is stored once, however many layers read it. Not counted: what the embedding, the
final norm and the loss keep, the logits, and the working memory of the one layer that is being computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerType, LayerTypes
from lckv.sharing.plan import LayerGroup, layer_groups
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.precision import Precision, precision


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between steps."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(parameters: int, numbers: Precision, *, optimizer_ranks: int) -> StateBytes:
    """Of a rank with so many parameters, whose optimizer state is shared out over `optimizer_ranks` ranks (1:
    not at all)."""
    return StateBytes(
        weights=parameters * numbers.bytes,
        gradients=parameters * 4,
        optimizer=round(parameters * numbers.optimizer_bytes / optimizer_ranks),
    )


@dataclass(frozen=True)
class Kept:
    """What full recompute keeps for backward on one pipeline stage, in tensors."""

    inputs: int
    """Layer inputs [s / T, b, h]."""

    shared: int
    """Keys and values, 2 x [s, b, g, d], that a layer reads from another."""


def kept_by_full_recompute(compression: CompressionConfig, num_layers: int, layers: range) -> Kept:
    """For the pipeline stage with `layers`. At least one pass without gradient (m >= 1) is assumed of cyclic
    groups."""
    layer_types = compression.map(num_layers)
    first, last = compression.forward_passes, compression.forward_passes + compression.backward_passes - 1
    inputs, read = 0, set()
    for group in layer_groups(layer_types):
        for number in range(first if group.iterated else last, last + 1):
            for layer in _run_by_pass(layer_types, group, kept=number == last):
                if layer.index in layers:
                    read.add((layer.source, _pass_read(layer, group, number, last)))
            inputs += sum(index in layers for index in range(group.start, group.stop))
    # What arrives from the previous stage is one tensor, kept whole: also what only later stages read.
    arriving = {
        (layer.source, last) for layer in layer_types.layers[layers.start :] if layer.source < layers.start
    }
    return Kept(inputs, len(read | arriving))


def _run_by_pass(layer_types: LayerTypes, group: LayerGroup, *, kept: bool) -> Iterator[LayerType]:
    """Layers whose attention reads another layer in a pass; the passes before the kept one stop below the
    group's top."""
    for layer in layer_types.layers[group.start : group.stop if kept else group.stop - 1]:
        if layer.source != layer.index:
            yield layer


def _pass_read(layer: LayerType, group: LayerGroup, number: int, last: int) -> int:
    """From which pass come the keys and values that `layer` reads in pass `number`; below the group only the
    last pass's survive."""
    if layer.source < group.start:
        return last
    return number - 1 if layer.cyclic else number


def kept_bytes(kept: Kept, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> int:
    """Of one micro-batch on one rank."""
    ranks = parallel.tensor_model_parallel_size
    tokens = train.seq_length * train.micro_batch_size
    hidden = tokens * model.hidden_size // (ranks if parallel.sequence_parallel else 1)
    key_value = 2 * tokens * max(1, model.query_groups // ranks) * model.head_dim
    return precision(train.precision).bytes * (kept.inputs * hidden + kept.shared * key_value)

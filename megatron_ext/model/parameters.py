"""How many parameters a run's model has, and where they are, without building it. Neither torch nor Megatron
is loaded.

Per layer, with h hidden size, a = query heads x d, g KV heads, d channels of a head, f MLP width:
    query and output 2 h a + keys and values 2 h g d (if it computes any) + MLP 3 h f + norms 2 h
    + first guess 2 h g d (if there is one, and a layer below reads it) + 4 (if it mixes those of two layers)
    + those of the KV policy's own (if it computes keys and values)
and biases (a + 2 g d) and norms of heads (2 d) where the model has them; a layer that only reads keys and
values has neither for them. Around the layers: embedding and output layer, padded vocabulary x h each, and
the final norm, h.
"""

import math
from dataclasses import dataclass

from lckv.config import CompressionConfig
from lckv.policies.config import PolicyConfig
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.model.placement import Placement


@dataclass(frozen=True)
class StageParameters:
    """Parameters on every tensor-parallel rank of one pipeline stage."""

    chunks: tuple[range, ...]
    """The stage's stretches of layers."""

    split: int
    """This rank's parts of matrices that are split over the tensor-parallel ranks."""

    copied: int
    """Norms, weights that mix keys and values, and those of the KV policy's own, which every tensor-parallel
    rank has whole."""

    tied_copy: int
    """This rank's part of a tied output layer that is a copy of an earlier stage's embedding."""

    of_policy: int = 0
    """Those of the KV policy's own, among `copied`."""

    @property
    def per_rank(self) -> int:
        """All that lie in a rank's memory."""
        return self.split + self.copied + self.tied_copy


def padded_vocab_size(vocab_size: int, model: ModelConfig, parallel: ParallelConfig) -> int:
    """The true size rounded up to a multiple of make_vocab_size_divisible_by * tensor_model_parallel_size."""
    multiple = model.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return multiple * math.ceil(vocab_size / multiple)


def stage_parameters(
    model: ModelConfig,
    compression: CompressionConfig,
    parallel: ParallelConfig,
    placement: Placement,
    *,
    vocab_size: int,
) -> tuple[StageParameters, ...]:
    """The stages from the first to the last; `vocab_size` is the true one, without padding."""
    stages, ranks = placement.stages, parallel.tensor_model_parallel_size
    matrix = padded_vocab_size(vocab_size, model, parallel) * model.hidden_size // ranks
    tied = not model.untie_embeddings_and_output_weights
    layer_types = compression.family(model.num_layers).stored
    guessed = layer_types.cyclic_sources if compression.first_guess else ()
    guess = 2 * model.query_groups * model.head_dim * model.hidden_size
    of_policy, counts = policy_parameters(model, compression.policy), []
    for stage in range(stages):
        first, last = stage == 0, stage == stages - 1
        layers = placement.layers_of(stage)
        computes_kv = [index in layer_types.kv_layers for index in layers]
        guesses = guess * sum(index in guessed for index in layers)
        counts.append(
            StageParameters(
                chunks=placement.of_stage(stage),
                split=matrix * (first + (last and not tied))
                + (sum(_split(model, kv) for kv in computes_kv) + guesses) // ranks,
                copied=sum(_norms(model, kv) for kv in computes_kv)
                + of_policy * sum(computes_kv)
                + 4 * sum(layer_types[index].mixes is not None for index in layers)
                + model.hidden_size * last,
                tied_copy=matrix * (last and tied and not first),
                of_policy=of_policy * sum(computes_kv),
            )
        )
    return tuple(counts)


def total_parameters(stages: tuple[StageParameters, ...], parallel: ParallelConfig) -> int:
    """Parameters of the whole model: copies on other ranks and a tied output layer count once,
    vocabulary padding counts."""
    return sum(stage.split * parallel.tensor_model_parallel_size + stage.copied for stage in stages)


def policy_parameters(model: ModelConfig, policy: PolicyConfig) -> int:
    """Parameters of the KV policy's own in a layer that computes keys and values."""
    projection = policy.traits.projection
    if projection is None:
        return 0
    shapes = projection.parameters(model.hidden_size, model.query_groups, bias=model.add_qkv_bias)
    return sum(map(math.prod, shapes.values()))


def _split(model: ModelConfig, computes_kv: bool) -> int:
    """Parameters of a layer that tensor-parallel ranks share out."""
    query = model.num_attention_heads * model.head_dim
    projected = query + 2 * model.query_groups * model.head_dim * computes_kv
    hidden = model.hidden_size
    return hidden * (projected + query + 3 * model.ffn_size) + projected * model.add_qkv_bias


def _norms(model: ModelConfig, computes_kv: bool) -> int:
    """Parameters of a layer that every tensor-parallel rank has whole."""
    return 2 * model.hidden_size + (1 + computes_kv) * model.head_dim * model.qk_layernorm

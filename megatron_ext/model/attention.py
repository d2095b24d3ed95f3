"""Self-attention over keys and values that may be another layer's.

Shapes: s tokens, b micro-batch, h query heads and g KV heads of this tensor-parallel rank, d channels of a
head, e extra channels of keys and queries where the KV policy biases keys.
"""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import Attention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.config import CompressionConfig
from lckv.policies.base import KeyValue, Statistics, TokenContext
from lckv.sharing.execution import Two
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.mixing import Mixture, Second, initial_weight, mixed
from megatron_ext.mcore import name_argument
from megatron_ext.model.contexts import LayerContext, Own, Source, keys_values
from megatron_ext.model.linear import FirstGuessLinear, QKVLinear, TakingPart
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.policy_projection import PolicyLinear
from megatron_ext.model.transformer_config import SharedKVTransformerConfig
from megatron_ext.parallel.context import ContextGroup


class SharedKVAttention(Attention):
    """Self-attention of one layer of a sharing map.

    A layer that computes keys and values has Megatron's fused `linear_qkv`, laid out as everywhere in
    Megatron; a layer that only reads has `linear_q` and no K/V weights.
    """

    def __init__(
        self,
        config: SharedKVTransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            **name_argument(name),
        )
        self.layer_type = config.layer_types[layer_number - 1]
        self.has_kv_weights = self.layer_type.index in config.layer_types.kv_layers
        self.computes_kv = self.has_kv_weights
        self.lends = self.layer_type.index in config.layer_types.lenders
        if self.layer_type.mixes is not None:
            self.key_weight, self.value_weight = (self._mix_weight() for _ in range(2))
        self.policy = config.compression.policy.build()
        self.context_group = ContextGroup(self.pg_collection.cp, ring=config.sends_keys_round)
        self.head_dim = self.hidden_size_per_attention_head
        self.query_heads = config.num_attention_heads // self.world_size
        width = self.query_projection_size + (2 * self.kv_projection_size if self.has_kv_weights else 0)
        projection = submodules.linear_qkv(
            config.hidden_size,
            width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.pg_collection.tp,
        )
        setattr(self, "linear_qkv" if self.has_kv_weights else "linear_q", projection)
        if config.compression.first_guess and self.layer_type.index in config.layer_types.cyclic_sources:
            self.linear_first_guess = FirstGuessLinear(
                config, config.hidden_size, 2 * self.kv_projection_size, self.pg_collection.tp
            )
        self.projection = self.policy.traits.projection if self.has_kv_weights else None
        if self.projection is not None:
            norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            linear = PolicyLinear(config, self.pg_collection.tp, per_layer=self.projection.per_layer)
            setattr(self, self.projection.norm_name, norm)
            setattr(self, self.projection.name, linear)
        self.q_layernorm = self._head_norm(submodules.q_layernorm)
        self.k_layernorm = self._head_norm(submodules.k_layernorm) if self.has_kv_weights else None

    def take(self, layer_types: LayerTypes, compression: CompressionConfig) -> None:
        """Do what `layer_types` says of this layer from now on: that map, or one of the family, of
        `compression`. Where others in a family have this layer compute keys and values, and this one does
        not, its weights for them get zeros for gradients."""
        self.layer_type = layer_types[self.layer_type.index]
        self.computes_kv = self.layer_type.index in layer_types.kv_layers
        self.core_attention.sight = compression.sight(self.layer_type)

    def _mix_weight(self) -> torch.nn.Parameter:
        """Of what the layer mixes in, and of its own, or of what it reads first: [2], the same on every
        rank."""
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        weight = initial_weight(self.config.compression.mix_scaling_factor)
        return torch.nn.Parameter(weight.to(device, self.config.params_dtype))

    def _head_norm(self, spec: object) -> torch.nn.Module | None:
        if spec is None or not self.config.qk_layernorm:
            return None
        return build_module(
            spec, config=self.config, hidden_size=self.head_dim, eps=self.config.layernorm_epsilon
        )

    def forward(
        self,
        hidden_states: Tensor,
        shared: Source | None,
        context: LayerContext,
        projected: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], Own | None]:
        """Attend from `hidden_states` [s, b, hidden] (normalised) to `shared`, or to the layer's own keys and
        values.

        `shared` is given iff the layer reads other layers', or mixes what another lends into its own;
        `projected` is what `projected()` made of the layer's input.
        Returns Megatron's (output, bias), and what the layer makes of its own keys and values if it computes
        any.
        """
        self.require_source(shared)
        lent, shared = self.parted(self.joined(shared))
        query, *others = self.heads(hidden_states, lent)
        own = self._own(self.read(query, projected), *others, context=context) if others else None
        key_value = shared
        if key_value is None:
            assert own is not None
            key_value = own.key_value
        output = self.attend(self.attending(query, context.tokens), key_value, context.tokens.documents)
        return self.linear_proj(output), own

    def joined(self, shared: Source | None) -> KeyValue | None:
        """What the layer takes of others; of two that it reads, what it reads of them. Of those that it
        mixes, gradients of the weights are summed over ranks, each of which has some of the heads."""
        if not isinstance(shared, Two):
            return shared
        layer, mixture = self.layer_type, None
        assert layer.second is not None
        if layer.mixes is not None:
            key, value = self._mix_weights()
            mixture = Mixture(key, value, self.config.compression.mix_scaling_factor)
        return KeyValue(*Second(layer.second, mixture).joined(*shared))

    def parted(self, shared: KeyValue | None) -> tuple[KeyValue | None, KeyValue | None]:
        """What the layer takes of another as what it mixes into its own, and what it attends to."""
        return (None, shared) if self.layer_type.borrows is None else (shared, None)

    def require_source(self, shared: Source | None) -> None:
        """Raises ValueError where keys and values of other layers are missing, or given without need."""
        layer = self.layer_type
        takes = (layer.source != layer.index) + (layer.mixes is not None or layer.values is not None)
        given = 2 if isinstance(shared, Two) else int(shared is not None)
        if takes == given:
            return
        does, others = ("reads", layer.sources) if layer.borrows is None else ("mixes in", (layer.borrows,))
        raise ValueError(
            f"layer {layer.index} {does} the keys and values of layer {' and '.join(map(str, others))}, "
            f"which were {'not ' if given < takes else ''}given to it."
        )

    def keys_values(
        self,
        hidden_states: Tensor,
        context: LayerContext,
        lent: KeyValue | None = None,
        projected: Tensor | None = None,
    ) -> Own:
        """The layer's keys and values alone, from `hidden_states` [s, b, hidden] (normalised), and from what
        is `lent` to a layer that mixes. `projected`: as in `forward`."""
        *query, key, value = self.kv_heads(hidden_states, lent)
        return self._own(self.read(query[0] if query else None, projected), key, value, context=context)

    def _own(self, read: Tensor | None, key: Tensor, value: Tensor, *, context: LayerContext) -> Own:
        return Own(*self.of_policy(read, key, value, context), KeyValue(key, value) if self.lends else None)

    def projected(self, inputs: Tensor) -> Tensor | None:
        """What parameters of the KV policy's own make of the layer's input [s / shards, b, hidden], before
        its norm: [s, b, g, 1]; None: it has none, or the layer computes no keys and values."""
        if self.projection is None or not self.computes_kv:
            return None
        norm, linear = getattr(self, self.projection.norm_name), getattr(self, self.projection.name)
        numbers: Tensor = linear(norm(inputs))
        return numbers

    def read(self, query: Tensor | None, projected: Tensor | None) -> Tensor | None:
        """What the KV policy reads of queries [s, b, h, d] and of what `projected` returned."""
        return self.policy.traits.read(query, projected)

    def first_guess(self, hidden_states: Tensor, tokens: TokenContext) -> KeyValue:
        """What is guessed of the layer's keys and values, of the rank's part of rows, from the input states
        of its group [s / shards, b, hidden], through which no gradient flows.

        The map is linear in the input divided by its root mean square: the weights of a norm would be part of
        it anyway, and those of the group's lowest layer lie within its projection where layers are fused."""
        normed = torch.nn.functional.rms_norm(
            hidden_states.detach(), hidden_states.shape[-1:], eps=self.config.layernorm_epsilon
        )
        key, value = self.linear_first_guess(normed).unflatten(-1, (-1, 2, self.head_dim)).unbind(3)
        return KeyValue(tokens.rotate(key), value)

    def kv_heads(self, hidden_states: Tensor, lent: KeyValue | None = None) -> tuple[Tensor, ...]:
        """As `heads`, of a layer that computes keys and values; without queries where that is cheaper and the
        KV policy does not read them."""
        if self.policy.traits.reads_query or not self._can_project_part:
            return self.heads(hidden_states, lent)
        projected, _ = self.linear_qkv(
            hidden_states, part="keys and values", heads=(self.num_query_groups_per_partition, self.head_dim)
        )
        key, value = projected.view(*projected.shape[:2], -1, 2, self.head_dim).unbind(3)
        return self._mixed(self._normalise(self.k_layernorm, key), value, lent)

    @property
    def _groups_split_over_ranks(self) -> bool:
        """Fewer KV heads than ranks: Megatron splits the rows of one KV head over several ranks."""
        return self.config.num_query_groups < self.world_size

    def heads(self, hidden_states: Tensor, lent: KeyValue | None = None) -> tuple[Tensor, ...]:
        """Queries [s, b, heads, d] from `hidden_states` [s, b, hidden] (normalised), and where the layer
        computes them keys and values [s, b, g, d], as the KV policy gets them: with what is `lent` to a layer
        that mixes. The query heads are then all those of these KV heads, of which `attending` takes this
        rank's."""
        if not self.computes_kv:
            query = self._query_alone(hidden_states)
            return (self._normalise(self.q_layernorm, query),)
        query, key, value = self._split(self.linear_qkv(hidden_states)[0])
        own = self._mixed(self._normalise(self.k_layernorm, key), value, lent)
        return self._normalise(self.q_layernorm, query), *own

    def _mixed(self, key: Tensor, value: Tensor, lent: KeyValue | None) -> KeyValue:
        """Keys and values [s, b, g, d] before RoPE, with what is lent to a layer that mixes. Each rank has
        some of the heads: gradients of the weights are summed over ranks. What is kept for backward, or lent,
        gets memory of its own: views of the fused projection would keep its queries alive."""
        borrows = self.layer_type.borrows is not None
        if self.lends or borrows:
            key, value = key.contiguous(), value.contiguous()
        if not borrows:
            return KeyValue(key, value)
        assert lent is not None
        scale = self.config.compression.mix_scaling_factor
        pairs = zip(lent, (key, value), self._mix_weights(), strict=True)
        return KeyValue(*(mixed(other, own, weight, scale) for other, own, weight in pairs))

    def _mix_weights(self) -> tuple[Tensor, ...]:
        """Of keys and of values, [2] each, whose gradients are summed over ranks."""
        weights = torch.stack((self.key_weight, self.value_weight))
        return copy_to_tensor_model_parallel_region(weights, group=self.pg_collection.tp).unbind()

    def _query_alone(self, hidden_states: Tensor) -> Tensor:
        """Queries before their norm, of a layer that only reads."""
        if not self.has_kv_weights:
            return self.linear_q(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
        if unused := [*self._parameters_for_keys()]:
            hidden_states = TakingPart.apply(hidden_states, *unused)
        if self._can_project_part:
            part, _ = self.linear_qkv(
                hidden_states, part="query", heads=(self.num_query_groups_per_partition, self.head_dim)
            )
            return part.unflatten(-1, (-1, self.head_dim))
        return self._of_rank(self._split(self.linear_qkv(hidden_states)[0])[0])

    def _parameters_for_keys(self) -> Iterator[torch.nn.Parameter]:
        """Those that only a layer uses that computes keys and values, besides the fused projection's."""
        if self.k_layernorm is not None:
            yield from self.k_layernorm.parameters()
        yield from self.policy_parameters()

    def policy_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of the KV policy's own."""
        if self.projection is not None:
            for name in (self.projection.norm_name, self.projection.name):
                yield from getattr(self, name).parameters()

    @property
    def _can_project_part(self) -> bool:
        return (
            isinstance(self.linear_qkv, QKVLinear)
            and self.linear_qkv.can_project_part()
            and not self._groups_split_over_ranks
        )

    def attending(self, query: Tensor, tokens: TokenContext) -> Tensor:
        """The queries of `heads` as they attend, [s, b, h, d + e]."""
        if not self.computes_kv:
            return self.policy.query(query, tokens)
        return self._of_rank(self.policy.query(query, tokens, self.num_query_groups_per_partition))

    def of_policy(
        self, read: Tensor | None, key: Tensor, value: Tensor, context: LayerContext
    ) -> tuple[KeyValue, Statistics]:
        """What the KV policy makes, of whole rows, of keys and values, the results of `heads` or `kv_heads`,
        and of what it reads besides."""
        return keys_values(self.policy, key, value, read, context, self.context_group)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, rows of this rank] to key and value [s, b, g, d] and the query heads that belong to them."""
        groups = self.num_query_groups_per_partition
        if self._groups_split_over_ranks:
            ranks_per_group = self.world_size // self.config.num_query_groups
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            mixed = mixed.chunk(self.config.num_query_groups, dim=-1)[
                self.pg_collection.tp.rank() // ranks_per_group
            ]
        mixed = mixed.unflatten(-1, (groups, -1, self.head_dim))
        # one split, whose gradient is one copy
        query, key, value = mixed.split((mixed.shape[3] - 2, 1, 1), 3)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)

    def _of_rank(self, query: Tensor) -> Tensor:
        """This rank's query heads [s, b, h, d] among those of its KV heads."""
        if not self._groups_split_over_ranks:
            return query
        ranks_per_group = self.world_size // self.config.num_query_groups
        return query.chunk(ranks_per_group, dim=2)[self.pg_collection.tp.rank() % ranks_per_group]

    @staticmethod
    def _normalise(norm: torch.nn.Module | None, heads: Tensor) -> Tensor:
        return heads if norm is None else norm(heads)

    def attend(self, query: Tensor, key_value: KeyValue, documents: Documents | None) -> Tensor:
        """Attention without projections: query [s, b, h, d + e] to [s, b, h * d]."""
        core = partial(self.core_attention, documents=documents)
        if self.checkpoint_core_attention and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(core, False, query, key_value.key, key_value.value)
        return core(query, key_value.key, key_value.value)

    def get_query_key_value_tensors(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        """Megatron's own seam, which has no place for another layer's keys and values."""
        raise TypeError("SharedKVAttention projects through forward() and keys_values().")

"""The attention of one layer, without projections.

Shapes: as in `megatron_ext.model.attention`; k tokens of whole rows.
"""

from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lckv.attention.backends import Choice
from lckv.attention.visibility import Documents, Visibility
from megatron_ext.model.attention_backend import choose_backend
from megatron_ext.model.transformer_config import SharedKVTransformerConfig
from megatron_ext.parallel.context import ContextGroup
from megatron_ext.parallel.key_ring import KeyRing


class CoreAttention(MegatronModule):
    """The attention of one layer, without projections:
    picks the kernel and knows what the layer's queries see."""

    def __init__(
        self,
        config: SharedKVTransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        layer, compression = config.layer_types[layer_number - 1], config.compression
        self.sight = compression.sight(layer)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.key_bias = compression.policy.traits.key_bias
        assert pg_collection is not None
        self.chunks = ContextGroup(pg_collection.cp).chunks
        self.ring = KeyRing(pg_collection.cp) if config.sends_keys_round else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """query [s, b, h, d + e], key [k, b, g, d + e] and value [k, b, g, d] to [s, b, h * d].

        Keys, values and documents are those of whole rows of k tokens, of which this rank has s. Each of its
        chunks attends to all that comes before it in its row, and to itself. Where keys and values go round,
        key and value are the rank's part [s, ...]."""
        if self.ring is not None:
            return self._attend_round(self.ring, query, key, value, documents)
        bounds = self.chunks.bounds(len(key))
        outputs = [
            self._attend(
                chunk,
                key[:stop],
                value[:stop],
                None if documents is None else documents.cut(len(key), (0, stop)),
            )
            for chunk, (_, stop) in zip(query.chunk(len(bounds)), bounds, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_round(
        self, ring: KeyRing, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None
    ) -> Tensor:
        pair_for = self._backend(query).pair
        assert pair_for is not None
        output = ring.attend(
            query,
            key,
            value,
            documents,
            exclude_self=self.sight.exclude_self,
            biased=self.key_bias is not None,
            scale=self.scale,
            pair=pair_for(query),
        )
        return output.flatten(2)

    def _backend(self, query: Tensor) -> Choice:
        return choose_backend(
            self.config.attention_kernel, device=query.device, dtype=query.dtype, head_dim=query.shape[-1]
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """From the last tokens of rows to all of them."""
        visibility, rows = Visibility(*self.sight, documents), query.shape[1]
        heads: tuple[Tensor, ...] = query, key, value
        if documents is None:  # rows are alike, and stand as heads of one row, whose output is [s, 1, b h, d]
            heads = tuple(tensor.flatten(1, 2)[:, None] for tensor in heads)
        attend = partial(
            self._backend(query).attend,
            *(tensor.permute(1, 2, 0, 3) for tensor in heads),
            visibility,
            scale=self.scale,
            key_bias=self.key_bias,
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        if dropout == 0.0 or self.config.sequence_parallel:  # the block has forked the random state already
            output = attend(dropout=dropout)
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                output = attend(dropout=dropout)
        return output.permute(2, 0, 1, 3).flatten(1).unflatten(1, (rows, -1))  # to [s, b, h * d]

"""One layer of a plain model, read from canonical tensors and run in float32, so that a model of any size can
be run layer by layer over a calibration text.

Shapes: b rows, T tokens, h hidden size, e = h channels of a projection's input (h + 1 where projections have
a bias: the last one is always 1), g KV heads, G query heads of a KV head, D channels of a head.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm, silu

from lckv.attention.backends import choose
from lckv.attention.visibility import Visibility
from lckv.config import Sight
from lckv.rope import RotaryEmbedding, rotate
from lckv.weights.tensors import TensorSource, row_chunks
from megatron_ext.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"


class KeysValues(NamedTuple):
    """[b, T, g, D] both; keys before or after RoPE."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class StreamedLayer:
    """Weights in float32, and what they compute."""

    model: ModelConfig
    query: Tensor
    """[g, G, D, e]."""

    key: Tensor
    """[g, D, e]."""

    value: Tensor
    """[g, D, e]."""

    output: Tensor
    """[h, g, G, D]."""

    input_norm: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def read(cls, source: TensorSource, model: ModelConfig, index: int) -> "StreamedLayer":
        """Layer `index` of the plain model whose canonical tensors are in `source`."""
        name = f"decoder.layers.{index}."

        def weight(part: str) -> Tensor:
            return source.read(name + part).float()

        fused = weight("self_attention.linear_qkv.weight")
        if model.add_qkv_bias:
            fused = torch.cat([fused, weight("self_attention.linear_qkv.bias")[:, None]], dim=1)
        heads = fused.unflatten(0, (model.query_groups, -1, model.head_dim))  # [g, G + 2, D, e]
        output = weight("self_attention.linear_proj.weight")
        return cls(
            model,
            query=heads[:, :-2],
            key=heads[:, -2],
            value=heads[:, -1],
            output=output.unflatten(1, (model.query_groups, -1, model.head_dim)),
            input_norm=weight("input_layernorm.weight"),
            mlp_norm=weight("pre_mlp_layernorm.weight"),
            gate_up=weight("mlp.linear_fc1.weight"),
            down=weight("mlp.linear_fc2.weight"),
        )

    def with_attention(self, query: Tensor, output: Tensor) -> "StreamedLayer":
        """The layer with other weights for queries and outputs."""
        return replace(self, query=query, output=output)

    def inputs(self, states: Tensor) -> Tensor:
        """What the projections read, [..., e], of hidden states [..., h]."""
        normed = rms_norm(states, states.shape[-1:], self.input_norm, self.model.layernorm_epsilon)
        return pad(normed, (0, 1), value=1.0) if self.model.add_qkv_bias else normed

    def keys_values(self, inputs: Tensor) -> KeysValues:
        """Of `inputs` [b, T, e], before RoPE."""
        return KeysValues(heads_of(inputs, self.key), heads_of(inputs, self.value))

    def attend(self, inputs: Tensor, reads: KeysValues, sight: Sight) -> Tensor:
        """What the heads return, [b, T, g G D], for `inputs` [b, T, e] and keys before RoPE."""
        tokens = inputs.shape[1]
        turn = self._rope.rotation(torch.arange(tokens)[:, None])
        query = rotate(heads_of(inputs, self.query.flatten(0, 1)), turn).transpose(1, 2)
        key, value = rotate(reads.key, turn).transpose(1, 2), reads.value.transpose(1, 2)
        attend = choose("sdpa", device=query.device, dtype=query.dtype, head_dim=self.model.head_dim).attend
        result = attend(query, key, value, Visibility(*sight), scale=self.model.head_dim**-0.5)
        return result.transpose(1, 2).flatten(2)

    def mlp(self, states: Tensor) -> Tensor:
        """What the MLP adds to [..., h]."""
        normed = rms_norm(states, states.shape[-1:], self.mlp_norm, self.model.layernorm_epsilon)
        gate, up = (normed @ self.gate_up.T).chunk(2, dim=-1)
        return (silu(gate) * up) @ self.down.T

    @property
    def output_matrix(self) -> Tensor:
        """[h, g G D]."""
        return self.output.flatten(1)

    @property
    def _rope(self) -> RotaryEmbedding:
        model = self.model
        longest = model.max_position_embeddings
        assert longest is not None
        return RotaryEmbedding(model.head_dim, model.rotary_base, model.rope_scaling.scaling, longest)


def heads_of(inputs: Tensor, weight: Tensor) -> Tensor:
    """[b, T, heads, D] of inputs [b, T, e] and weights [heads, D, e]."""
    return (inputs @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2])


def embed(source: TensorSource, tokens: Tensor) -> Tensor:
    """Embedded `tokens`, int64 [b, T], in float32 [b, T, h]; the matrix is read in pieces."""
    info = source.infos()[EMBEDDING]
    states = torch.empty((*tokens.shape, info.shape[1]))
    for rows in row_chunks(info):
        here = (tokens >= rows.start) & (tokens < rows.stop)
        if here.any():
            states[here] = source.read(EMBEDDING, rows).float()[tokens[here] - rows.start]
    return states

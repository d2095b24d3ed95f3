"""Names and shapes of a decoder's weights."""

from dataclasses import dataclass

from lckv.families.decoder import Decoder
from lckv.weights.tensors import TensorInfo


@dataclass(frozen=True)
class WeightNames:
    """Names of modules with weights; {} is the number of the layer, from 0 at the bottom."""

    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    input_norm: str = "model.layers.{}.input_layernorm"
    attention: str = "model.layers.{}.self_attn"
    query: str = "model.layers.{}.self_attn.q_proj"
    key: str = "model.layers.{}.self_attn.k_proj"
    value: str = "model.layers.{}.self_attn.v_proj"
    query_norm: str = "model.layers.{}.self_attn.q_norm"
    key_norm: str = "model.layers.{}.self_attn.k_norm"
    guessed_key: str = "model.layers.{}.self_attn.first_guess_k_proj"
    guessed_value: str = "model.layers.{}.self_attn.first_guess_v_proj"
    output: str = "model.layers.{}.self_attn.o_proj"
    mlp_norm: str = "model.layers.{}.post_attention_layernorm"
    gate: str = "model.layers.{}.mlp.gate_proj"
    up: str = "model.layers.{}.mlp.up_proj"
    down: str = "model.layers.{}.mlp.down_proj"


MIX_WEIGHTS = ("key_weight", "value_weight")
"""Names, within attention, of the weights that mix keys and values: of the other layer's, then of the own."""

LLAMA_NAMES = WeightNames()
"""Those of every family so far."""


def is_passed_over(name: str) -> bool:
    """Whether a tensor is none of the model's: the rotary frequencies that old checkpoints hold."""
    return name.endswith(".self_attn.rotary_emb.inv_freq")


def weights_of(decoder: Decoder, names: WeightNames) -> dict[str, TensorInfo]:
    """The tensors of the decoder by their names, from the embedding to the output layer.

    Layers that only read the keys and values of another one have neither k_proj, v_proj nor k_norm; only
    layers that a layer below them reads have a first guess, if there is one; layers that mix keys and values
    of two layers have two weights for each of both; parameters of the KV policy's own are those of layers
    that compute keys and values. A tied model has no tensor of the head.
    """
    hidden, width = decoder.hidden_size, decoder.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": (decoder.vocab_size, hidden)}
    layer_types = decoder.compression.family(decoder.num_hidden_layers).stored
    guessed = layer_types.cyclic_sources if decoder.compression.first_guess else ()
    for index in range(decoder.num_hidden_layers):
        shapes[f"{names.input_norm.format(index)}.weight"] = (hidden,)
        shapes |= _attention(decoder, names, index, computes_kv=index in layer_types.kv_layers)
        if index in guessed:
            rows = decoder.num_key_value_heads * decoder.head_dim
            shapes |= {
                f"{name.format(index)}.weight": (rows, hidden)
                for name in (names.guessed_key, names.guessed_value)
            }
        if layer_types[index].mixes is not None:
            attention = names.attention.format(index)
            shapes |= {f"{attention}.{name}": (2,) for name in MIX_WEIGHTS}
        shapes[f"{names.mlp_norm.format(index)}.weight"] = (hidden,)
        shapes[f"{names.gate.format(index)}.weight"] = (width, hidden)
        shapes[f"{names.up.format(index)}.weight"] = (width, hidden)
        shapes[f"{names.down.format(index)}.weight"] = (hidden, width)
    shapes[f"{names.final_norm}.weight"] = (hidden,)
    if not decoder.tie_word_embeddings:
        shapes[f"{names.head}.weight"] = (decoder.vocab_size, hidden)
    return {name: TensorInfo(shape, decoder.dtype) for name, shape in shapes.items()}


def _attention(
    decoder: Decoder, names: WeightNames, index: int, *, computes_kv: bool
) -> dict[str, tuple[int, ...]]:
    query_rows, kv_rows = (
        heads * decoder.head_dim for heads in (decoder.num_attention_heads, decoder.num_key_value_heads)
    )
    rows = {names.query: query_rows}
    if computes_kv:
        rows |= {names.key: kv_rows, names.value: kv_rows}
    shapes: dict[str, tuple[int, ...]] = {
        f"{name.format(index)}.weight": (count, decoder.hidden_size) for name, count in rows.items()
    }
    if decoder.qkv_bias:
        shapes |= {f"{name.format(index)}.bias": (count,) for name, count in rows.items()}
    projection = decoder.compression.policy.traits.projection
    if projection is not None and computes_kv:
        attention = names.attention.format(index)
        own = projection.parameters(decoder.hidden_size, decoder.num_key_value_heads, bias=decoder.qkv_bias)
        shapes |= {f"{attention}.{name}": shape for name, shape in own.items()}
    if decoder.qk_norm:
        norms = (names.query_norm, names.key_norm) if computes_kv else (names.query_norm,)
        shapes |= {f"{name.format(index)}.weight": (decoder.head_dim,) for name in norms}
    shapes[f"{names.output.format(index)}.weight"] = (decoder.hidden_size, query_rows)
    return shapes

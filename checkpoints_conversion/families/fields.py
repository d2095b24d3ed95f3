"""Fields of a Hugging Face config: what they are here, and what is wrong with their values."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

REQUIRED = object()
"""The default of a field that a config must have."""
_KINDS = {int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Field:
    """A config field that is a field of `ModelConfig`."""

    target: str
    """The field of `ModelConfig`."""

    kind: type[int] | type[float] | type[bool]

    default: object = REQUIRED
    """What transformers assumes where the field is absent or null; None: what `ModelConfig` makes of null."""

    inverted: bool = False
    """True here is false there."""

    def problems(self, name: str, given: object) -> Iterator[str]:
        """What is wrong with the value of the field `name`; None where it is absent."""
        if given is None:
            if self.default is REQUIRED:
                yield f"{name} is missing; the model cannot be known without it."
            return
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(given, accepted) or (self.kind is not bool and isinstance(given, bool)):
            yield f"{name} is {given!r}; it must be {_KINDS[self.kind]}."

    def read(self, given: object) -> object:
        """The value in `ModelConfig`; `given` has no `problems`."""
        value = self.default if given is None else given
        if self.kind is float and isinstance(value, int):
            value = float(value)
        return not value if self.inverted else value

    def write(self, value: object) -> object:
        """The value in a config of the value in `ModelConfig`."""
        return not value if self.inverted else value


@dataclass(frozen=True)
class Fixed:
    """A config field of which only one meaning can be converted; absent or null, it has that meaning."""

    value: object
    why: str
    """Why no other one can."""

    synonyms: tuple[object, ...] = ()
    """Other spellings of the same value."""

    written: bool = True
    """Whether configs of the family are written with the field."""

    def problems(self, name: str, given: object) -> Iterator[str]:
        """What is wrong with the value of the field `name`; None where it is absent."""
        if given not in (None, self.value, *self.synonyms):
            yield f"{name} is {given!r}; only {self.value!r} can be converted: {self.why}."


def token_problems(name: str, given: object) -> Iterator[str]:
    """What is wrong with the value of a field that gives special tokens."""
    tokens = given if isinstance(given, list) else [given]
    if given is not None and not all(
        isinstance(token, int) and not isinstance(token, bool) for token in tokens
    ):
        yield f"{name} is {given!r}; it must be null, the number of a token, or a list of such numbers."


COMMON_FIELDS = {
    "vocab_size": Field("vocab_size", int),
    "hidden_size": Field("hidden_size", int),
    "intermediate_size": Field("ffn_hidden_size", int),
    "num_hidden_layers": Field("num_layers", int),
    "num_attention_heads": Field("num_attention_heads", int),
    "num_key_value_heads": Field("num_query_groups", int),
    "head_dim": Field("kv_channels", int, default=None),
    "max_position_embeddings": Field("max_position_embeddings", int),
    "rms_norm_eps": Field("layernorm_epsilon", float),
    "tie_word_embeddings": Field("untie_embeddings_and_output_weights", bool, default=False, inverted=True),
    "attention_dropout": Field("attention_dropout", float, default=0.0),
    "initializer_range": Field("init_method_std", float, default=0.02),
}
"""Fields that every family has."""
LLAMA_FIELDS = COMMON_FIELDS | {
    "num_key_value_heads": replace(COMMON_FIELDS["num_key_value_heads"], default=None)
}
"""Early Llama configs do not give the number of key/value heads: there are as many as query heads."""

COMMON_FIXED = {
    "hidden_act": Fixed("silu", "the MLP here is SwiGLU", synonyms=("swish",)),
    "quantization_config": Fixed(
        None, "quantized weights cannot be trained on; convert the original model", written=False
    ),
    "auto_map": Fixed(None, "the model brings its own code, which may compute something else", written=False),
    "is_encoder_decoder": Fixed(False, "the model here is a decoder", written=False),
    "add_cross_attention": Fixed(False, "the model here is a decoder", written=False),
}
"""Fields with one meaning in every family."""
LLAMA_FIXED = COMMON_FIXED | {
    "attention_bias": Fixed(
        False,
        "true adds a bias to the output projection of attention too, which the model here does not have",
    ),
    "mlp_bias": Fixed(False, "the MLP here has no bias"),
    "rope_interleaved": Fixed(False, "rotary embeddings turn channel i with channel i + D/2", written=False),
}
"""Those of Llama."""

IGNORED = {
    "_name_or_path": "where the model came from",
    "transformers_version": "who wrote the file",
    "transformers.js_config": "for another program",
    "unsloth_fixed": "who wrote the file",
    "is_llama_config": "says again what model_type says",
    "use_cache": "how the model is run",
    "pretraining_tp": (
        "old code of Hugging Face cut its matrix products into so many pieces: the same numbers up to "
        "rounding"
    ),
    "output_attentions": "what a call returns",
    "output_hidden_states": "what a call returns",
    "return_dict": "what a call returns",
    "torchscript": "how the model is run",
    "chunk_size_feed_forward": "how the model is run",
    "_attn_implementation_autoset": "how the model is run",
    "attn_implementation": "how the model is run",
    "problem_type": "of classifiers",
    "id2label": "of classifiers",
    "label2id": "of classifiers",
    "num_labels": "of classifiers",
}
"""Fields that have no bearing on weights and outputs, with the reason."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMMON_WEIGHTS = {
    "embedding.word_embeddings.weight": (EMBEDDING,),
    "decoder.layers.{}.input_layernorm.weight": ("model.layers.{}.input_layernorm.weight",),
    "decoder.layers.{}.self_attention.linear_qkv.weight": (
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "decoder.layers.{}.self_attention.linear_proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "decoder.layers.{}.pre_mlp_layernorm.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "decoder.layers.{}.mlp.linear_fc1.weight": (
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": ("model.layers.{}.mlp.down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": (HEAD,),
}
"""Names of weights that every family has, by canonical names."""
QKV_BIAS_WEIGHTS = {
    "decoder.layers.{}.self_attention.linear_qkv.bias": (
        "model.layers.{}.self_attn.q_proj.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        "model.layers.{}.self_attn.v_proj.bias",
    ),
}
"""Biases of query, key and value."""
QK_NORM_WEIGHTS = {
    "decoder.layers.{}.self_attention.q_layernorm.weight": ("model.layers.{}.self_attn.q_norm.weight",),
    "decoder.layers.{}.self_attention.k_layernorm.weight": ("model.layers.{}.self_attn.k_norm.weight",),
}
"""Norms of query and key heads."""

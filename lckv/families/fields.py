"""Fields of a Hugging Face config: what they are here, and what is wrong with their values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lckv.reading import describe, is_of_kind

REQUIRED = object()
"""The default of a field that a config must have."""


@dataclass(frozen=True)
class Field:
    """A config field that is the field of `Decoder` of the same name."""

    kind: type[int] | type[float] | type[bool]

    default: object = REQUIRED
    """What transformers assumes where the field is absent or null; None: it follows from other fields."""

    old_name: str | None = None
    """What old configs call the field."""

    def problems(self, name: str, config: Mapping[str, object]) -> Iterator[str]:
        """What is wrong with the field `name` of a config."""
        given, old = config.get(name), config.get(self.old_name or name)
        if given is None and old is None:
            if self.default is REQUIRED:
                yield f"{name} is missing; the model cannot be known without it."
            return
        for key, value in ((name, given), (self.old_name, old if self.old_name else None)):
            if value is not None and not is_of_kind(value, self.kind):
                yield f"{key} is {value!r}; it must be {describe(self.kind)}."
        if None not in (given, old) and given != old:
            yield f"{name} is {given} and {self.old_name} is {old}; they mean the same: remove one."

    def read(self, name: str, config: Mapping[str, object]) -> object:
        """The value in `Decoder`; the field has no `problems`."""
        value = config.get(name)
        if value is None and self.old_name is not None:
            value = config.get(self.old_name)
        if value is None:
            value = self.default
        return float(value) if self.kind is float and isinstance(value, int) else value


@dataclass(frozen=True)
class Fixed:
    """A config field of which only one value can be computed here; absent or null, it has that meaning."""

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
            needed = "left out" if self.value is None else repr(self.value)
            yield f"{name} is {given!r}; it must be {needed}: {self.why}."


def token_problems(name: str, given: object) -> Iterator[str]:
    """What is wrong with the value of a field that gives special tokens."""
    tokens = given if isinstance(given, list) else [given]
    if given is not None and not all(is_of_kind(token, int) for token in tokens):
        yield f"{name} is {given!r}; it must be null, the number of a token, or a list of such numbers."


COMMON_FIELDS = {
    "vocab_size": Field(int),
    "hidden_size": Field(int),
    "intermediate_size": Field(int),
    "num_hidden_layers": Field(int),
    "num_attention_heads": Field(int),
    "num_key_value_heads": Field(int),
    "head_dim": Field(int, default=None),
    "max_position_embeddings": Field(int),
    "rms_norm_eps": Field(float),
    "tie_word_embeddings": Field(bool, default=False),
    "attention_dropout": Field(float, default=0.0),
    "initializer_range": Field(float, default=0.02),
}
"""Fields that every family has."""
LLAMA_FIELDS = COMMON_FIELDS | {
    "num_key_value_heads": replace(COMMON_FIELDS["num_key_value_heads"], default=None),
    "max_position_embeddings": replace(
        COMMON_FIELDS["max_position_embeddings"], old_name="max_sequence_length"
    ),
}
"""Early Llama configs do not give the number of key/value heads: there are as many as query heads. Those of
the time of Llama 1 call the longest context max_sequence_length."""

COMMON_FIXED = {
    "hidden_act": Fixed("silu", "the MLP here is SwiGLU", synonyms=("swish",)),
    "quantization_config": Fixed(
        None, "quantized weights are no floating-point numbers; take the original model", written=False
    ),
    "auto_map": Fixed(None, "the model brings its own code, which may compute something else", written=False),
    "is_encoder_decoder": Fixed(False, "the model here is a decoder", written=False),
    "add_cross_attention": Fixed(False, "the model here is a decoder", written=False),
    "pruned_heads": Fixed({}, "all heads of a layer are there", written=False),
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
    "use_bfloat16": "how the model is run, on another kind of hardware",
    "tf_legacy_loss": "for another framework",
    "is_decoder": "every model here is a decoder",
    "cross_attention_hidden_size": "of models with an encoder",
    "tie_encoder_decoder": "of models with an encoder",
    "finetuning_task": "where the model came from",
    "task_specific_params": "how text is sampled",
    "tokenizer_class": "of the tokenizer",
    "prefix": "of the tokenizer",
    "sep_token_id": "of the tokenizer",
    "unk_token_id": "of the tokenizer",
    "problem_type": "of classifiers",
    "id2label": "of classifiers",
    "label2id": "of classifiers",
    "num_labels": "of classifiers",
}
"""Fields that have no bearing on weights and outputs, with the reason. Those of transformers' base config
that its newest version still has are harmless too (`harmless.py`)."""

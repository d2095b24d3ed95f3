"""The Hugging Face configuration of a Llama-family decoder with shared or merged keys and values."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from lckv.config import CompressionConfig
from lckv.errors import SettingError
from lckv.rope import LinearScaling, Llama3Scaling

_PUBLISHED_FIELDS = ("layer_types", "forward_passes", "backward_passes", "sliding_window", "force_nodiag")
"""What the published LCKV models have beside Llama's fields, where this configuration has `compression`."""

_LLAMA_FIELDS_WITH_ONE_VALUE = {
    "attention_bias": (
        False,
        "a bias on the output projection is not supported; qkv_bias is that of queries, keys and values",
    ),
    "mlp_bias": (False, "biases in the MLP are not supported"),
    "use_sequential": (False, "generation is token by token anyway"),
    "pretraining_tp": (1, "slicing of weights is not supported"),
}

_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of rotary position embedding, and what each needs in `rope_parameters`, in the order of
`lckv.rope`'s dataclasses."""


class LCKVLlamaConfig(PreTrainedConfig):
    """Configuration of `LCKVLlamaForCausalLM`: Llama's fields, and what makes its KV cache small.

    Fields that Llama's configuration does not have: `qkv_bias` (Qwen2), `qk_norm` (Qwen3), and `compression`,
    the fields of `lckv.config.CompressionConfig` as a dict. The published LCKV models have some of these
    beside Llama's fields, the map as a string under `layer_types`; they are read all the same.

    Raises ValueError for settings that do not fit together, with field, value and way out.
    """

    model_type = "lckv-llama"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers reads it
        "past_key_values",
        "auxiliary_loss",
        "statistics",
    ]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float = 0.0
    qkv_bias: bool = False
    qk_norm: bool = False
    compression: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolve defaults, read older spellings, check."""
        given = vars(self)
        if given["num_key_value_heads"] is None:
            self.num_key_value_heads = self.num_attention_heads
        if given["head_dim"] is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}; it must be a multiple of num_attention_heads, which "
                    "is "
                    f"{self.num_attention_heads}, or head_dim must be given."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name, (value, why) in _LLAMA_FIELDS_WITH_ONE_VALUE.items():
            if kwargs.get(name, value) != value:
                raise ValueError(f"{name} is {kwargs[name]}: {why}; it must be {value}.")
            kwargs.pop(name, None)
        if __name__.startswith("lckv."):
            kwargs.pop(
                "auto_map", None
            )  # names modelling files, which this class does not write when it is saved
        published = {name: kwargs.pop(name) for name in _PUBLISHED_FIELDS if name in kwargs}
        self.compression = self._compression(self.compression, published)
        super().__post_init__(**kwargs)
        of_compression = self.compression_config().problems(self.num_hidden_layers)
        problems = [*self._problems(), *(str(problem.under("compression")) for problem in of_compression)]
        if problems:
            raise ValueError("\n".join(problems))

    def compression_config(self) -> CompressionConfig:
        """The field `compression` as the dataclass."""
        return _compression_config(self.compression or {})

    def rope_scaling_config(self) -> Llama3Scaling | LinearScaling | None:
        """The scaling in `rope_parameters`, for `lckv.rope`."""
        parameters = self.rope_parameters or {}
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            return None
        values = [parameters[name] for name in _ROPE_PARAMETERS[kind]]
        return LinearScaling(*values) if kind == "linear" else Llama3Scaling(*values)

    @staticmethod
    def _compression(given: dict[str, Any] | None, published: Mapping[str, Any]) -> dict[str, Any]:
        if given is not None and published:
            raise ValueError(
                f"{', '.join(published)} are given beside compression; the published LCKV models have only "
                "the former, and models of "
                "this version only the latter."
            )
        fields = dict(given or published)
        if "layer_types" in published and "s" not in (published["layer_types"] or ""):
            fields.pop("sliding_window", None)  # they always have one, whether or not a layer has a window
        if not isinstance(fields.get("layer_types"), str | None):
            raise ValueError(
                f"layer_types is {fields['layer_types']}; it must be the sharing map, such as "
                "0_6_6_6_6_6_6_7. (Transformers' own field "
                "of this name, a list of attention kinds, has no meaning here: mark layers with a window by "
                "an 's' in the map.)"
            )
        return asdict(_compression_config(fields))

    def _problems(self) -> Iterator[str]:
        if self.hidden_act != "silu":
            yield f"hidden_act is {self.hidden_act!r}; only silu is supported."
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                "num_key_value_heads, which is "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            yield f"head_dim is {self.head_dim}; it must be even."
        policy = self.compression_config().policy
        if self.attention_dropout > 0 and not policy.traits.dropout:
            yield (
                f"attention_dropout is {self.attention_dropout}; it must be 0 with the policy {policy.name} "
                "(compression.policy), whose keys carry a bias."
            )
        if self.head_dim < policy.traits.min_head_dim:
            yield (
                f"head_dim is {self.head_dim}; it must be at least {policy.traits.min_head_dim} with the "
                f"policy {policy.name} "
                "(compression.policy)."
            )
        yield from self._rope_problems()

    def _rope_problems(self) -> Iterator[str]:
        parameters = self.rope_parameters or {}
        kind = parameters.get("rope_type", "default")
        if kind not in _ROPE_PARAMETERS:
            yield f"rope_parameters.rope_type is {kind!r}; it must be one of {', '.join(_ROPE_PARAMETERS)}."
        missing = [name for name in _ROPE_PARAMETERS.get(kind, ()) if parameters.get(name) is None]
        if missing:
            yield f"rope_parameters of rope_type {kind} lack {', '.join(missing)}."
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            yield "rope_parameters.partial_rotary_factor must be 1: all channels of a head are rotated."


def _compression_config(content: Mapping[str, Any]) -> CompressionConfig:
    """Raises SettingError, whose fields have the names that they have in config.json."""
    try:
        return CompressionConfig.from_dict(content)
    except SettingError as error:
        raise error.under("compression") from None

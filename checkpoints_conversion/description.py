"""What a model is, apart from its weights and from where it is stored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.fusion import canonical_tensors
from lckv.config import CompressionConfig
from lckv.families.decoder import Decoder, TokenIds
from lckv.families.lckv_llama import LCKV_LLAMA
from lckv.reading import read
from lckv.rope_scaling import type_of
from lckv.weights.tensors import TensorInfo, dtype_name, dtype_of
from megatron_ext.config import ModelConfig, RopeScalingConfig
from megatron_ext.validation.layout import compression_problems

_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_base": "rope_base",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
    "attention_dropout": "attention_dropout",
    "init_method_std": "initializer_range",
}
"""Fields of `ModelConfig` that are fields of `Decoder`, with their names there."""


@dataclass(frozen=True)
class ModelDescription:
    """One model: everything that its outputs depend on besides the weights. Fields of `model` that have
    defaults depending on others are filled in on construction."""

    model: ModelConfig
    """Architecture; vocab_size is the true size, without padding."""

    compression: CompressionConfig
    """Sharing map, passes, window, and the policy with its stage."""

    family: str
    """Name of the model family (`lckv/families/registry.py`), under which Hugging Face knows the model."""

    dtype: torch.dtype
    """Of the weights, one of `lckv.weights.tensors.WEIGHT_DTYPES`."""

    token_ids: TokenIds = field(default_factory=dict)
    """Special tokens."""

    def __post_init__(self) -> None:
        if self.model.vocab_size is None or self.model.max_position_embeddings is None:
            raise ConversionError(
                f"model.vocab_size is {self.model.vocab_size} and model.max_position_embeddings is "
                f"{self.model.max_position_embeddings}; a model that is converted needs both."
            )
        if problems := [*compression_problems(self.compression, self.model.num_layers)]:
            raise ConversionError("\n".join(problems))
        explicit: dict[str, Any] = {
            "ffn_hidden_size": self.model.ffn_size,
            "num_query_groups": self.model.query_groups,
            "kv_channels": self.model.head_dim,
        }
        object.__setattr__(self, "model", ModelConfig(**{**vars(self.model), **explicit}))

    @property
    def vocab_size(self) -> int:
        """True vocabulary size, in tokens."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    def expected_tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the model has, under canonical names."""
        return canonical_tensors(self.decoder(), LCKV_LLAMA)

    def decoder(self) -> Decoder:
        """The same without what only training knows. The inverse of `of_decoder`."""
        model = self.model
        return Decoder(
            family=self.family,
            **{theirs: getattr(model, ours) for ours, theirs in _SAME.items()},
            tie_word_embeddings=not model.untie_embeddings_and_output_weights,
            rope_scaling=model.rope_scaling.scaling,
            compression=self.compression,
            token_ids=self.token_ids,
            dtype=self.dtype,
        )

    @classmethod
    def of_decoder(cls, decoder: Decoder) -> "ModelDescription":
        """The description of any decoder; what only training knows has its default."""
        scaling = decoder.rope_scaling
        kind = "none" if scaling is None else type_of(scaling)
        parameters = {} if scaling is None else asdict(scaling)
        model = ModelConfig(
            **{ours: getattr(decoder, theirs) for ours, theirs in _SAME.items()},
            untie_embeddings_and_output_weights=not decoder.tie_word_embeddings,
            rope_scaling=read(RopeScalingConfig, {"type": kind, **parameters}),
        )
        return cls(model, decoder.compression, decoder.family, decoder.dtype, decoder.token_ids)

    def to_json(self) -> dict[str, Any]:
        """Fit for `json.dumps`; `from_json` gives the same description back."""
        return {
            "family": self.family,
            "dtype": dtype_name(self.dtype),
            "token_ids": self.token_ids,
            "model": asdict(self.model),
            "compression": self.compression.as_fields(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelDescription":
        """The inverse of `to_json`; raises ModelError naming all settings that are wrong."""
        fields = ("family", "dtype", "token_ids", "model", "compression")
        if set(content) != set(fields):
            raise ConversionError(
                f"the description of a model has the fields {list(content)}; it must have {list(fields)}."
            )
        return cls(
            model=read(ModelConfig, content["model"], "model"),
            compression=CompressionConfig.from_dict(content["compression"]),
            family=str(content["family"]),
            dtype=dtype_of(content["dtype"], "dtype"),
            token_ids=dict(content["token_ids"]),
        )

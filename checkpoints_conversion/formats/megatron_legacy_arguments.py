"""What the arguments of a run of Megatron's older training program say of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from lckv.config import CompressionConfig
from lckv.errors import SettingError
from lckv.policies.config import PolicyConfig
from lckv.policies.registry import config_classes
from lckv.precision import name_of
from megatron_ext.config import ModelConfig

_NEEDED: Mapping[str, object] = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
"""Arguments with the one value that can be converted."""
_ALLOWED: Mapping[str, object] = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "num_experts": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
    "window_size": None,
    "virtual_pipeline_model_parallel_size": None,
}
"""The same of arguments that not every version has."""
_KNOWN_TOKENIZERS = {"Llama2Tokenizer": (32_000, {"bos_token_id": 1, "eos_token_id": 2})}
"""Vocabulary size and special tokens of tokenizers that are one and the same everywhere."""


@dataclass(frozen=True)
class Arguments:
    """Arguments by their names; what is asked for must be there and of the right kind."""

    values: Mapping[str, Any]
    where: Path
    """The file that they are from."""

    def integer(self, name: str, default: int | None = None) -> int:
        """A number of at least 1."""
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise self.refuse(name, "an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or False; False where it is not given."""
        value = self._get(name, False)
        if type(value) is not bool:
            raise self.refuse(name, "True or False")
        return value

    def refuse(self, name: str, needed: str) -> ConversionError:
        """The error of an argument with a wrong value."""
        given = f"is {self.values[name]!r}" if name in self.values else "is not there"
        return ConversionError(f"{self.where}: of its arguments, {name} {given}; it must be {needed}.")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def describe(
    arguments: Arguments,
    *,
    dtype: torch.dtype,
    padded_vocab_size: int,
    vocab_size: int | None,
) -> ModelDescription:
    """The model that was trained with `arguments`, whose embedding has `padded_vocab_size` rows of `dtype`.

    `vocab_size` goes before the arguments. Raises ConversionError naming the argument that is missing or has
    a value that cannot be converted.
    """
    _check_fixed(arguments)
    heads = arguments.integer("num_attention_heads")
    hidden = arguments.integer("hidden_size")
    size, token_ids = _vocabulary(arguments, padded_vocab_size, vocab_size)
    model = ModelConfig(
        num_layers=arguments.integer("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=arguments.integer("ffn_hidden_size"),
        num_attention_heads=heads,
        # Without grouped-query attention the number of groups is there, and means nothing.
        num_query_groups=arguments.integer("num_query_groups")
        if arguments.flag("group_query_attention")
        else heads,
        kv_channels=arguments.integer("kv_channels", hidden // heads),
        vocab_size=size,
        max_position_embeddings=arguments.integer("max_position_embeddings"),
        rotary_base=arguments.number("rotary_base", 10000.0),
        layernorm_epsilon=arguments.number("norm_epsilon", arguments.number("layernorm_epsilon", 1e-5)),
        untie_embeddings_and_output_weights=arguments.flag("untie_embeddings_and_output_weights"),
        add_qkv_bias=arguments.flag("add_qkv_bias"),
        qk_layernorm=arguments.flag("qk_layernorm"),
    )
    policy = _policy(arguments, dtype)
    compression = CompressionConfig() if policy is None else CompressionConfig(policy=policy)
    return ModelDescription(model, compression, "llama", dtype, token_ids)


def _check_fixed(arguments: Arguments) -> None:
    for name, needed in _NEEDED.items():
        if name not in arguments.values or arguments.values[name] != needed:
            raise arguments.refuse(name, f"{needed!r}, as in Llama models")
    for name, needed in _ALLOWED.items():
        if arguments.values.get(name, needed) != needed:
            raise arguments.refuse(name, f"{needed!r}, as in Llama models")
    rotary = arguments.flag("use_rotary_position_embeddings")
    if not rotary and arguments.values.get("position_embedding_type") != "rope":
        raise arguments.refuse("position_embedding_type", "'rope'")


def _vocabulary(
    arguments: Arguments, padded: int, given: int | None
) -> tuple[int, dict[str, int | list[int] | None]]:
    tokenizer = arguments.values.get("tokenizer_type")
    known, tokens = _KNOWN_TOKENIZERS.get(tokenizer, (None, {})) if isinstance(tokenizer, str) else (None, {})
    size = given or arguments.values.get("vocab_size") or known
    if type(size) is not int:
        raise ConversionError(
            f"{arguments.where}: the arguments do not say how many tokens the tokenizer ({tokenizer}) knows, "
            f"and of the embedding's {padded} rows some are padding. Give the vocabulary size."
        )
    if not 0 < size <= padded:
        raise ConversionError(
            f"{arguments.where}: the vocabulary size is {size}, but the embedding has {padded} rows; give "
            "the true vocabulary size."
        )
    return size, dict(tokens)


def _policy(arguments: Arguments, dtype: torch.dtype) -> PolicyConfig | None:
    """The KV policy that knows the run's arguments as its own; None where none does."""
    values = {**arguments.values, "params_dtype": name_of(dtype)}
    try:
        candidates = (kind.from_megatron_arguments(values) for kind in config_classes().values())
        return next((policy for policy in candidates if policy is not None), None)
    except SettingError as error:
        raise ConversionError(
            f"{arguments.where}: of its arguments, {error} Others can be given with --argument NAME=VALUE."
        ) from error

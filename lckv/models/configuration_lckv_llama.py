"""The Hugging Face configuration of a Llama-family decoder with shared or merged keys and values."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.decoder import TOKEN_IDS, Decoder, default_head_dim
from lckv.families.fields import LLAMA_FIXED
from lckv.families.published_lckv import PUBLISHED_FIELDS, compression_of
from lckv.families.rope import ORIGINAL, read_rope, rope_problems, write_rope
from lckv.remote_code import write_modelling_files
from lckv.rope import RotaryEmbedding
from lckv.rope_scaling import Scaling, longest_context
from lckv.weights.tensors import dtype_name

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "attention_dropout", "qkv_bias", "qk_norm",
)  # fmt: skip
"""Fields that `Decoder` has under the same name."""
_OF_NO_ACCOUNT = ("use_sequential", "pretraining_tp")
"""Fields of published configs: how the code that wrote them is run."""

logger = logging.getLogger(__name__)


class _NoModellingFiles:
    """`auto_map` of a configuration that has none of its own: TRL asks every model for it that is not of
    transformers. It is no field, so that it is not saved."""

    def __get__(self, config: object, owner: type) -> dict[str, str]:
        return {}


class LCKVLlamaConfig(PreTrainedConfig):
    """Configuration of `LCKVLlamaForCausalLM`: Llama's fields, and what makes its KV cache small.

    Fields that Llama's configuration does not have: `qkv_bias` (Qwen2), `qk_norm` (Qwen3), and `compression`,
    the fields of `lckv.config.CompressionConfig` as a dict. The published LCKV models have some of these
    beside Llama's fields, the map as a string under `layer_types`; they are read all the same.

    Raises ModelError for settings that do not fit together, with field, value and way out.
    """

    model_type = "lckv-llama"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers reads it
        "cache",
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

    auto_map = _NoModellingFiles()

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolve defaults, read older spellings, check."""
        given = vars(self)
        if given["num_key_value_heads"] is None:
            self.num_key_value_heads = self.num_attention_heads
        if given["head_dim"] is None:
            self.head_dim = default_head_dim(self.hidden_size, self.num_attention_heads)
        problems = list(LLAMA_FIXED["hidden_act"].problems("hidden_act", self.hidden_act))
        for name in ("attention_bias", "mlp_bias"):
            problems += LLAMA_FIXED[name].problems(name, kwargs.pop(name, None))
        for name in _OF_NO_ACCOUNT:
            kwargs.pop(name, None)
        if __name__.startswith("lckv."):
            kwargs.pop("auto_map", None)  # names the modelling files of the folder, which are not in use
        published = {name: kwargs.pop(name) for name in PUBLISHED_FIELDS if name in kwargs}
        self.compression = compression_of({**published, "compression": self.compression}).as_fields()
        rope = {"rope_parameters": kwargs.get("rope_scaling") or self.rope_parameters}
        wrong_rope = list(rope_problems(rope | {ORIGINAL: kwargs[ORIGINAL]})) if ORIGINAL in kwargs else []
        original = kwargs.pop(ORIGINAL, None)
        if original is not None and not wrong_rope:
            self.rope_parameters = {**(rope["rope_parameters"] or {}), ORIGINAL: original}
            kwargs.pop("rope_scaling", None)
        super().__post_init__(**kwargs)
        wrong_rope = wrong_rope or list(rope_problems({"rope_parameters": self.rope_parameters}))
        problems += wrong_rope or self.as_decoder().problems()
        if problems:
            raise ModelError("\n".join(problems))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As PreTrainedConfig, and with it the modelling files, with which the folder loads where this
        package is not installed (`trust_remote_code`). Models are saved through this, too."""
        auto_map = self._write_modelling_files(Path(save_directory))
        # No second copy by transformers, of files that need the package.
        of_saving = {"auto_map": dict(auto_map), "_auto_class": None} if auto_map else {}
        vars(self).update(of_saving)
        try:
            super().save_pretrained(save_directory, push_to_hub, **kwargs)
        finally:
            for name in of_saving:
                vars(self).pop(name, None)

    def _write_modelling_files(self, folder: Path) -> Mapping[str, str]:
        """What config.json shall say of them; nothing where there are none."""
        if type(self) is not LCKVLlamaConfig or folder.is_file():
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return write_modelling_files(folder, self.compression_config().policy.name)
        except ValueError as error:
            logger.warning(
                "%s is saved without modelling files, so that it loads only where lckv is installed: %s",
                folder,
                error,
            )
            return {}

    def compression_config(self) -> CompressionConfig:
        """The field `compression` as the dataclass."""
        return CompressionConfig.from_dict(self.compression or {})

    def rope_scaling_config(self) -> Scaling | None:
        """The scaling in `rope_parameters`, for `lckv.rope`."""
        return self._rope()[1]

    def rotary_embedding(self) -> RotaryEmbedding:
        """What rotates queries and keys."""
        return RotaryEmbedding(self.head_dim, *self._rope(), self.max_position_embeddings)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest text: `max_position_embeddings`, or beyond it with dynamic scaling of the
        rotary embedding."""
        return longest_context(self.rope_scaling_config(), self.max_position_embeddings)

    def _rope(self) -> tuple[float, Scaling | None]:
        return read_rope({"rope_parameters": self.rope_parameters}, self.max_position_embeddings)

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """How others (transformers, vLLM) split the decoder over tensor-parallel ranks; None where they
        cannot: layers that are iterated and merged slots count all KV heads, and so does the gradient of
        weights that mix keys and values."""
        compression = self.compression_config()
        layer_types = compression.map(self.num_hidden_layers)
        if layer_types.any_cyclic or layer_types.lenders or not compression.policy.traits.keeps_every_token:
            return None
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        if self.qk_norm:
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        plan["layers.*.self_attn.o_proj"] = plan["layers.*.mlp.down_proj"] = "rowwise"
        return plan | {f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")}

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:  # type: ignore[override]
        """What goes through each part of the decoder, for others that cut it into stages; None where layers
        read keys and values of other layers, which they do not carry along."""
        layer_types = self.compression_config().map(self.num_hidden_layers)
        if not layer_types.is_plain:
            return None
        states = ["hidden_states"]
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (states, states),
            "norm": (states, states),
        }

    def as_decoder(self) -> Decoder:
        """The model that this describes; float32 where it names no dtype."""
        base, scaling = self._rope()
        return Decoder(
            **{name: getattr(self, name) for name in _SAME},
            rope_base=base,
            rope_scaling=scaling,
            compression=self.compression_config(),
            token_ids={name: getattr(self, name) for name in TOKEN_IDS},
            dtype=self.dtype if isinstance(self.dtype, torch.dtype) else torch.float32,
        )

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> "LCKVLlamaConfig":
        """The configuration of any `Decoder`; the inverse of `as_decoder`, but for the family."""
        fields: dict[str, Any] = {name: getattr(decoder, name) for name in _SAME}
        fields |= {name: decoder.token_ids.get(name) for name in TOKEN_IDS}
        return cls(
            **fields,
            **write_rope(decoder.rope_base, decoder.rope_scaling),
            compression=decoder.compression.as_fields(),
            dtype=dtype_name(decoder.dtype),
        )

"""What a model is, apart from its weights and from where it is stored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from checkpoints_conversion.tensors import WEIGHT_DTYPES, ConversionError, TensorInfo, expected_tensors
from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig
from megatron_ext.settings import read
from megatron_ext.validation.layout import compression_problems

TokenIds = dict[str, int | list[int] | None]
"""Special tokens by their names in a Hugging Face config: bos_token_id, eos_token_id, pad_token_id."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


@dataclass(frozen=True)
class ModelDescription:
    """One model: everything that its outputs depend on besides the weights. Fields of `model` that have
    defaults depending on others are filled in on construction."""

    model: ModelConfig
    """Architecture; vocab_size is the true size, without padding."""

    compression: CompressionConfig
    """Sharing map, passes, window, and the policy with its stage."""

    family: str
    """Name of the model family (`families/registry.py`), under which Hugging Face knows the model."""

    dtype: torch.dtype
    """Of the weights, one of `tensors.WEIGHT_DTYPES`."""

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

    @property
    def is_plain(self) -> bool:
        """Whether every layer reads its own keys and values and keeps all tokens, as in the models of other
        software (layers may have windows)."""
        layers = self.compression.map(self.model.num_layers)
        own = all(layer.source == layer.index for layer in layers)
        return (
            own
            and not self.compression.force_nodiag
            and self.compression.policy == CompressionConfig().policy
        )

    def expected_tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the model has, under canonical names."""
        return expected_tensors(self.model, self.compression, self.vocab_size, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Fit for `json.dumps`; `from_json` gives the same description back."""
        return {
            "family": self.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            "token_ids": self.token_ids,
            "model": asdict(self.model),
            "compression": asdict(self.compression),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelDescription":
        """The inverse of `to_json`; raises ConversionError, or ConfigError naming all settings that are
        wrong."""
        fields = ("family", "dtype", "token_ids", "model", "compression")
        if set(content) != set(fields):
            raise ConversionError(
                f"the description of a model has the fields {list(content)}; it must have {list(fields)}."
            )
        return cls(
            model=read(ModelConfig, [("model: ", content["model"])]),
            compression=read(CompressionConfig, [("compression: ", content["compression"])]),
            family=str(content["family"]),
            dtype=dtype_of(content["dtype"], "dtype"),
            token_ids=dict(content["token_ids"]),
        )


def dtype_of(name: object, where: str) -> torch.dtype:
    """The dtype of weights called `name`, such as "bfloat16"; raises ConversionError with the field
    `where`."""
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ConversionError(f"{where} is {name!r}; weights of {', '.join(_DTYPES)} can be converted.")
    return dtype

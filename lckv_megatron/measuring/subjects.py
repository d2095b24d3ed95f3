"""Models that are measured, and the texts that they read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lckv.generation.loading import load_model
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and how it is called."""

    name: str
    model: LCKVLlamaForCausalLM
    prompts: Tensor
    """int64 [rows, tokens], of the longest length that is measured."""

    @property
    def policy(self) -> str:
        """Name of its KV policy."""
        return self.model.model.policy.name


def load_folder(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device
) -> tuple[LCKVLlamaForCausalLM, Any]:
    """The model of a Hugging Face folder and its tokenizer. Raises ConfigError."""
    try:
        return load_model(folder, dtype=dtype, device=device)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:  # memory of the device
        raise ConfigError(f"--models {folder} cannot be loaded: {error}") from error


def random_tokens(vocabulary: int, rows: int, length: int) -> Tensor:
    """int64 [rows, length], always the same."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def text_tokens(texts: Iterable[str], encode: Callable[[str], list[int]], rows: int, length: int) -> Tensor:
    """int64 [rows, length] of texts one after the other. Raises ConfigError where they are too short."""
    tokens: list[int] = []
    for text in texts:
        tokens += encode(text)
        if len(tokens) >= rows * length:
            return torch.tensor(tokens[: rows * length]).view(rows, length)
    raise ConfigError(
        f"--text has {len(tokens)} tokens, but {rows} prompts of {length} are measured; give more text, or "
        "smaller --lengths."
    )

"""The text that `--init svd` fits a sharing map on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.tokenizer import has_tokenizer
from megatron_ext.files import check_input

ROW_LENGTH = 512
"""Tokens of a row: each is a text of its own."""
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """The beginning of a text file in UTF-8."""

    text: Path
    num_tokens: int = DEFAULT_TOKENS

    def __post_init__(self) -> None:
        check_input("--calibration-text", self.text)
        if self.num_tokens < 2 or (self.num_tokens > ROW_LENGTH and self.num_tokens % ROW_LENGTH):
            raise ConversionError(
                f"--calibration-tokens is {self.num_tokens}; it must be a multiple of {ROW_LENGTH}, the "
                "length of a row, or one shorter row of at least 2."
            )

    def tokens(self, tokenizer: Path, longest: int) -> Tensor:
        """The first tokens, int64 [b, T], by the tokenizer in the folder `tokenizer`, of a model that knows
        `longest` positions. Raises ConversionError where the text has fewer."""
        from megatron_ext.data.tokenizers import load_tokenizer

        if not has_tokenizer(tokenizer):
            raise ConversionError(
                f"--calibration-text is given, but {tokenizer} holds no tokenizer; put the model's "
                "tokenizer.json into that folder."
            )
        length = min(ROW_LENGTH, self.num_tokens)
        if length > longest:
            raise ConversionError(
                f"--calibration-tokens is {self.num_tokens}, but the model knows {longest} positions and a "
                f"row has {length} tokens; give at most {longest}."
            )
        ids = load_tokenizer("huggingface", str(tokenizer)).encode(self._content())
        if len(ids) < self.num_tokens:
            raise ConversionError(
                f"--calibration-text {self.text} has {len(ids)} tokens, fewer than --calibration-tokens "
                f"{self.num_tokens}; give a longer text, or fewer tokens."
            )
        return torch.tensor(ids[: self.num_tokens]).view(-1, length)

    def to_json(self) -> Mapping[str, Any]:
        """For the record of the conversion: which text, and how much of it."""
        digest = hashlib.sha256(self._content().encode()).hexdigest()
        return {"file": self.text.name, "sha256": digest, "tokens": self.num_tokens}

    def _content(self) -> str:
        try:
            return self.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(
                f"--calibration-text {self.text} is no text in UTF-8: {error}. Give a text file."
            ) from error

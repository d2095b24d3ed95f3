"""How well a model predicts a text: cross-entropy per token, over rows of tokens cut from it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Perplexity:
    """The result."""

    loss: float
    """Mean cross-entropy, in nats per predicted token."""

    tokens: int
    """Predicted tokens; the first one of each row is only given."""

    @property
    def value(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def text_rows(path: Path, tokenizer: Tokenizer, rows: int, row_length: int) -> Tensor:
    """The first tokens of a text file, int64 [rows, row_length], one row after the other, nothing added.

    Raises ConfigError where the file cannot be read or is too short.
    """
    if rows < 1 or row_length < 2:
        raise ConfigError(f"--rows is {rows} and --row_length is {row_length}; they must be at least 1 and 2.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}") from error
    ids = tokenizer.encode(text)
    if len(ids) < rows * row_length:
        raise ConfigError(
            f"--text {path} has {len(ids):,} tokens; {rows} rows of {row_length} need {rows * row_length:,}. Give a longer text, or "
            "fewer or shorter rows."
        )
    return torch.tensor(ids[: rows * row_length]).view(rows, row_length)


def perplexity(rows: Tensor, logits: Iterable[Tensor | None]) -> Perplexity | None:
    """From rows int64 [B, T] and the logits float32 [T, vocabulary] of each, which are taken one at a time.

    Logits that are None, as on ranks that have none, make the result None.
    """
    losses = [
        cross_entropy(of_row[:-1], row[1:].to(of_row.device), reduction="none").double().sum().item()
        for row, of_row in zip(rows, logits, strict=True)
        if of_row is not None
    ]
    tokens = len(rows) * (rows.shape[1] - 1)
    return Perplexity(math.fsum(losses) / tokens, tokens) if losses else None

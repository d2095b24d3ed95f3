"""Perplexity of texts: the losses of their windows, added up."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from lckv_megatron.scoring.text_windows import Text, Window
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from lckv_megatron.scoring.window_losses import WindowLosses


@dataclass(frozen=True)
class Perplexity:
    """How well texts are predicted."""

    nats: float
    """Cross-entropy of all predicted tokens, summed."""

    tokens: int
    """Predicted ones."""

    num_bytes: int
    """Of the predicted text, in UTF-8."""

    texts: int
    windows: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Of the text."""
        return self.nats / math.log(2) / self.num_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "texts": self.texts,
            "windows": self.windows,
        }


@dataclass(frozen=True)
class Cut:
    """How texts become windows."""

    context: int
    stride: int


class Measurement:
    """Adds up losses of texts."""

    def __init__(self, cut: Cut, report: Callable[[int], object]) -> None:
        """`report` is called with numbers of tokens that were predicted."""
        self._cut, self._report = cut, report
        self._tokens = self._bytes = self._texts = self._windows = 0

    def run(self, texts: Iterator[Text], losses: "WindowLosses", batch_size: int) -> Perplexity:
        """Of `texts`, `batch_size` windows at a time. Raises ConfigError where there is nothing to predict,
        and ArithmeticError where the loss is not finite."""
        windows, nats = self._all_windows(texts), []
        while batch := list(islice(windows, batch_size)):
            nats.append(losses(batch))
            self._windows += len(batch)
            self._report(sum(window.predicted for window in batch))
        if not nats:
            raise ConfigError(
                "--text: the files hold nothing to predict; a text of at least two tokens is needed."
            )
        total = math.fsum(nats)
        if not math.isfinite(total):
            raise ArithmeticError(f"the loss is {total}; are the model's weights and --dtype right?")
        return Perplexity(total, self._tokens, self._bytes, self._texts, self._windows)

    def _all_windows(self, texts: Iterator[Text]) -> Iterator[Window]:
        for text in texts:
            self._texts, self._bytes = self._texts + 1, self._bytes + text.num_bytes
            self._tokens += len(text.ids) - 1
            yield from text.windows(self._cut.context, self._cut.stride)

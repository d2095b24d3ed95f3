"""Texts as tokens, cut into windows in which a model predicts them."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_ext.data.formats import TextFormat
from megatron_ext.data.records import parse_texts
from megatron_ext.data.sources import RecordReader, find_sources
from megatron_ext.errors import ConfigError


class Window(NamedTuple):
    """What a model is shown at once."""

    tokens: list[int]
    """At least two. The last one is predicted only."""

    predicted: int
    """How many of them, the last ones, are predicted; those before are context."""


@dataclass(frozen=True)
class Coder:
    """A tokenizer, as far as texts need it."""

    encode: Callable[[str], list[int]]
    """Without added tokens."""

    decode: Callable[[list[int]], str]

    begin: int | None = None
    """A token to put before every text, so that its own first token is predicted too;
    None: that one is given."""

    @classmethod
    def of_huggingface(cls, tokenizer: Any, *, begins: bool = True) -> "Coder":
        """`begins`: with the token before texts that the tokenizer puts there, if any."""
        puts = (
            begins
            and tokenizer.bos_token_id is not None
            and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        )
        return cls(
            lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
            tokenizer.decode,
            tokenizer.bos_token_id if puts else None,
        )

    def text(self, text: str, most: int) -> "Text | None":
        """The first tokens of `text`, at most `most` of them predicted;
        None where nothing is left to predict."""
        ids = self.encode(text)
        begin = [] if self.begin is None else [self.begin]
        kept = [*begin, *ids][: most + 1]
        if len(kept) < 2:
            return None
        whole = begin and len(kept) == len(ids) + 1
        return Text(kept, len(text.encode()) if whole else self.bytes_behind_first(kept))

    def bytes_behind_first(self, ids: list[int]) -> int:
        """Of the text of all tokens but the first, in UTF-8."""
        return len(self.decode(ids[1:]).encode())


@dataclass(frozen=True)
class Text:
    """A document as tokens."""

    ids: list[int]
    """The first one is given, all others are predicted."""

    num_bytes: int
    """Of the predicted part, in UTF-8."""

    def windows(self, context: int, stride: int) -> Iterator[Window]:
        """The first one predicts up to `context` tokens, each further one the next `stride` (at most
        `context`), the last of which sees `context` tokens."""
        done = 1
        while done < len(self.ids):
            end = min(len(self.ids), done + (context if done == 1 else stride))
            yield Window(self.ids[max(0, end - context - 1) : end], end - done)
            done = end


def read_texts(paths: Sequence[str], json_key: str, text_format: TextFormat = "auto") -> Iterator[str]:
    """The documents in files: each line of JSON lines, each row of Parquet, and whole texts.

    Raises ConfigError for what cannot be read.
    """
    try:
        for record in RecordReader(find_sources(paths, text_format=text_format), columns=[json_key]):
            yield from parse_texts(record, [json_key])
    except OSError as error:
        raise ConfigError(f"--text {error.filename} cannot be read: {error.strerror}.") from error


def whole_texts(texts: Iterable[str], coder: Coder, max_tokens: int | None) -> Iterator[Text]:
    """Each text by itself, as far as `max_tokens` predicted tokens go (None: all)."""
    left = sys.maxsize if max_tokens is None else max_tokens
    for text in texts:
        part = coder.text(text, left)
        if part is not None:
            yield part
            left -= len(part.ids) - 1
        if left <= 0:
            return


def rows_of_texts(texts: Iterable[str], coder: Coder, count: int, length: int) -> Iterator[Text]:
    """The first `count` rows of `length` tokens, side by side, as if each were a text of its own; what is
    left of a text is not used.

    Raises ConfigError if there are fewer.
    """
    rows = 0
    for text in texts:
        ids = coder.encode(text)
        for start in range(0, len(ids) - length + 1, length):
            row = ids[start : start + length]
            yield Text(row, coder.bytes_behind_first(row))
            rows += 1
            if rows == count:
                return
    raise ConfigError(
        f"--text: there are {rows} rows of {length} tokens; {count} are needed. Give a longer text, or "
        "fewer or shorter rows."
    )

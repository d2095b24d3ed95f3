"""Records of the input, a document each: a line of JSON, a whole text, or a row of a Parquet file."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lckv.surrogates import lone_surrogate
from megatron_ext.errors import ConfigError


class Record(NamedTuple):
    """One line of JSON, one whole text file (then `line` is 0), or one row of a Parquet file. Lines and rows
    count from 1."""

    path: str
    line: int
    data: bytes
    columns: tuple[bytes | None, ...] | None = None
    """Texts of a row, in place of `data`."""

    problem: str = ""
    """Why there is no content."""

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.path}:{self.line}" if self.line else self.path

    @property
    def size(self) -> int:
        """Bytes of content."""
        return len(self.data) if self.columns is None else sum(len(text or b"") for text in self.columns)


class BadRecordError(ConfigError):
    """A record that is not what it should be; its message names file and line."""


def parse_texts(record: Record, keys: Sequence[str]) -> list[str]:
    """The texts of a record: those of `keys` in a line of JSON; of a text file its only one; of a row of a
    Parquet file those of the columns that were read, which are `keys`.

    Raises BadRecordError if it is not valid JSON, lacks such a text, is not Unicode, or is too long.
    """
    if record.problem:
        raise BadRecordError(f"{record.place}: {record.problem}")
    if record.columns is not None:
        return [_text_of_column(record, key, text) for key, text in zip(keys, record.columns, strict=True)]
    if not record.line:
        return [_unicode(record, record.data)]
    value = parse_object(record)
    return [_text_of_key(record, value, key) for key in keys]


def parse_object(record: Record) -> dict[str, object]:
    """The JSON object of a line. Raises BadRecordError for anything else."""
    try:
        value = json.loads(record.data)
    except ValueError as error:
        raise BadRecordError(f"{record.place}: not valid JSON ({error}).") from error
    except RecursionError:
        raise BadRecordError(
            f"{record.place}: lists or objects in one another, too deep to be read."
        ) from None
    if not isinstance(value, dict):
        raise BadRecordError(f"{record.place}: a JSON object is needed, not {type(value).__name__}.")
    return value


def value_of_key(record: Record, value: Mapping[str, object], key: str) -> object:
    """What the object of a record has under `key`. Raises BadRecordError where it has no such key."""
    if key not in value:
        raise BadRecordError(
            f"{record.place}: no key {key!r}; the keys are {', '.join(map(repr, value)) or 'none'}."
        )
    return value[key]


def _text_of_key(record: Record, value: Mapping[str, object], key: str) -> str:
    text = value_of_key(record, value, key)
    if not isinstance(text, str):
        raise BadRecordError(f"{record.place}: {key!r} is not a text but {type(text).__name__}.")
    if not text.isascii() and (problem := lone_surrogate(text)) is not None:
        raise BadRecordError(f"{record.place}: {key!r}: {problem}.")
    return text


def _text_of_column(record: Record, key: str, text: bytes | None) -> str:
    if text is None:
        raise BadRecordError(f"{record.place}: {key!r} is not a text but null.")
    return _unicode(record, text)


def _unicode(record: Record, text: bytes) -> str:
    try:
        return text.decode("utf-8-sig" if record.columns is None else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{record.place}: not UTF-8 text (byte {error.start}).") from error

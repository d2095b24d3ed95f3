"""Raw text on disk: JSON lines and plain text files, compressed or not, read one record at a time.

A position in a list of sources is exact, so that a reader can start again where an earlier one stopped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from megatron_ext.data.decompression import CHUNK_BYTES, decompressed
from megatron_ext.errors import ConfigError

TextFormat = Literal["auto", "jsonl", "text"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """One input file: JSON lines with a document each, or a text that is one document.
    `size` is bytes on disk."""

    path: str
    size: int
    jsonl: bool

    @property
    def compressed(self) -> bool:
        """Whether the file is decompressed while it is read (.gz, .zst)."""
        return self.path.endswith((".gz", ".zst"))


@dataclass(frozen=True)
class Position:
    """A place between two records: `line` lines and `offset` bytes into `source`;
    `text_bytes` since the very start."""

    source: int = 0
    line: int = 0
    offset: int = 0
    text_bytes: int = 0


class Record(NamedTuple):
    """One line of JSON, or one whole text file (then `line` is 0). Lines count from 1."""

    path: str
    line: int
    data: bytes

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.path}:{self.line}" if self.line else self.path


class BadRecordError(ConfigError):
    """A record that is not what it should be; its message names file and line."""


def find_sources(
    inputs: Sequence[str], *, suffixes: Sequence[str] = (), text_format: TextFormat = "auto"
) -> list[Source]:
    """The files that `inputs` (files, globs, directories) stand for, in the order given; globs and
    directories sorted.

    Of a directory all files are taken, recursively, hidden ones excepted; `suffixes` keeps those whose name
    ends with one of them. With "auto", names ending with .jsonl or .ndjson (outside directories also .json;
    with or without .gz or .zst behind) are JSON lines, and other files are texts. Raises ConfigError if an
    input does not exist, stands for no file, or is a text by its name but looks like JSON lines.
    """
    sources: list[Source] = []
    for entry in inputs:
        paths = _expand(entry)
        kept = [path for path in paths if not suffixes or path.name.endswith(tuple(suffixes))]
        if not kept:
            hint = f"; no name ends with {' or '.join(suffixes)}" if paths else ""
            raise ConfigError(
                f"input {entry!r} stands for no file{hint}. Give files, globs or directories that exist."
            )
        jsonl_suffixes = _JSONL_SUFFIXES if Path(entry).is_dir() else (*_JSONL_SUFFIXES, ".json")
        sources += [_source(path, text_format, jsonl_suffixes) for path in kept]
        if text_format == "auto" and not Path(entry).is_dir():
            _refuse_doubtful(sources[-len(kept) :])
    return sources


def _expand(entry: str) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        return sorted(
            file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
    if path.exists() or not has_magic(entry):
        return [path] if path.exists() else []
    return sorted(Path(match) for match in glob(entry, recursive=True) if Path(match).is_file())


def _source(path: Path, text_format: TextFormat, jsonl_suffixes: tuple[str, ...]) -> Source:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    jsonl = name.endswith(jsonl_suffixes) if text_format == "auto" else text_format == "jsonl"
    return Source(str(path), path.stat().st_size, jsonl)


def _refuse_doubtful(sources: Sequence[Source]) -> None:
    for source in sources:
        if not source.jsonl and not source.compressed:
            with Path(source.path).open("rb") as start:
                if start.read(1) == b"{":
                    raise ConfigError(
                        f"input {source.path!r} looks like JSON lines but has another name; say "
                        "--text-format jsonl or text."
                    )


class RecordReader:
    """Iterates over the records of `sources`, from `start` on; blank lines are passed over.

    After each record `position` is the place behind it. Raises ConfigError when a record is longer than
    `max_record_bytes` (the bound on memory) or a compressed file is damaged.
    """

    def __init__(
        self, sources: Sequence[Source], start: Position = Position(), max_record_bytes: int = 1 << 26
    ) -> None:
        self.position = start
        self._sources = sources
        self._max_record_bytes = max_record_bytes
        self._disk: BinaryIO | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk read so far, those before `start` included."""
        done = sum(source.size for source in self._sources[: self.position.source])
        return done + (self._disk.tell() if self._disk is not None and self.position.line else 0)

    def __iter__(self) -> Iterator[Record]:
        while self.position.source < len(self._sources):
            source = self._sources[self.position.source]
            with Path(source.path).open("rb") as self._disk:
                stream = decompressed(source.path, self._disk)
                _skip(source, stream, self.position.offset)
                yield from self._lines(source, stream) if source.jsonl else self._text(source, stream)
            self._disk = None
            if source.jsonl:
                self.position = Position(self.position.source + 1, text_bytes=self.position.text_bytes)

    def _lines(self, source: Source, stream: BinaryIO) -> Iterator[Record]:
        while line := stream.readline(self._max_record_bytes + 1):
            at, size = self.position, len(line)
            self.position = Position(at.source, at.line + 1, at.offset + size, at.text_bytes + size)
            record = Record(source.path, self.position.line, line)
            self._check_length(record)
            if not line.isspace():
                yield record

    def _text(self, source: Source, stream: BinaryIO) -> Iterator[Record]:
        record = Record(source.path, 0, stream.read(self._max_record_bytes + 1))
        self._check_length(record)
        self.position = Position(
            self.position.source + 1, text_bytes=self.position.text_bytes + len(record.data)
        )
        yield record

    def _check_length(self, record: Record) -> None:
        if len(record.data) > self._max_record_bytes:
            raise ConfigError(
                f"{record.place}: the document is longer than {self._max_record_bytes >> 20} MiB, the bound "
                "on memory; is it the right format? If so, raise --max-document-mib."
            )


def text_bytes(sources: Sequence[Source]) -> int:
    """Bytes of text in all sources. Compressed files are read through for it."""
    return sum(_decompressed_size(source) if source.compressed else source.size for source in sources)


def parse_texts(record: Record, keys: Sequence[str]) -> list[str]:
    """The texts of a record: those of `keys` in a line of JSON; of a text file its only one.

    Raises BadRecordError if it is not valid JSON, lacks such a text, or is not Unicode.
    """
    if not record.line:
        return [_unicode(record)]
    try:
        value = json.loads(record.data)
    except ValueError as error:
        raise BadRecordError(f"{record.place}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise BadRecordError(f"{record.place}: a JSON object is needed, not {type(value).__name__}.")
    return [_text_of_key(record, value, key) for key in keys]


def _text_of_key(record: Record, value: Mapping[str, object], key: str) -> str:
    if key not in value:
        raise BadRecordError(
            f"{record.place}: no key {key!r}; the keys are {', '.join(map(repr, value)) or 'none'}."
        )
    text = value[key]
    if not isinstance(text, str):
        raise BadRecordError(f"{record.place}: {key!r} is not a text but {type(text).__name__}.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecordError(
                f"{record.place}: {key!r} holds half of a surrogate pair, not a character."
            ) from error
    return text


def _unicode(record: Record) -> str:
    try:
        return record.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{record.place}: not UTF-8 text (byte {error.start}).") from error


def _skip(source: Source, stream: BinaryIO, count: int) -> None:
    if not source.compressed:
        stream.seek(count)
        return
    while count > 0:
        chunk = stream.read(min(count, CHUNK_BYTES))
        if not chunk:
            raise ConfigError(
                f"{source.path}: shorter than when it was read before; start again with --overwrite."
            )
        count -= len(chunk)


def _decompressed_size(source: Source) -> int:
    with Path(source.path).open("rb") as disk:
        stream, size = decompressed(source.path, disk), 0
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
    return size

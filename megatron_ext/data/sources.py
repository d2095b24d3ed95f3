"""Raw text on disk: JSON lines, plain text and Parquet files, compressed or not, read one record at a time.

A position in a list of sources is exact, so that a reader can start again where an earlier one stopped.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_ext.data.decompression import CHUNK_BYTES, Compression, decompressed
from megatron_ext.data.expansion import expand, refuse_repeated
from megatron_ext.data.formats import BOM, Format, TextFormat, format_of
from megatron_ext.data.parquet import Column, ParquetTexts
from megatron_ext.data.records import BadRecordError, Record
from megatron_ext.errors import ConfigError

_SETTLING_SECONDS = 0.05
"""A file system's clock may tick as rarely: of two changes within one tick only the first one shows."""


@dataclass(frozen=True)
class FileState:
    """What changes when a file does: its size in bytes, its number on the disk, times of the last change of
    its content and of content or attributes, in nanoseconds."""

    size: int
    inode: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, state: os.stat_result) -> "FileState":
        """From what the operating system says."""
        return cls(state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns)


@dataclass(frozen=True)
class Source:
    """One input file: JSON lines with a document each, a text that is one document, or Parquet with a
    document in each row."""

    path: str
    state: FileState
    format: Format
    compression: Compression

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.state.size


@dataclass(frozen=True)
class Position:
    """A place between two records: `line` lines (or rows) and `offset` bytes into `source`; `text_bytes`
    since the very start."""

    source: int = 0
    line: int = 0
    offset: int = 0
    text_bytes: int = 0


def find_sources(
    inputs: Sequence[str], *, suffixes: Sequence[str] = (), text_format: TextFormat = "auto"
) -> list[Source]:
    """The files that `inputs` (files, globs, directories) stand for, in the order given; globs and
    directories sorted.

    Of a directory all files are taken, recursively, hidden ones excepted; `suffixes` keeps those whose name
    ends with one of them. With "auto" the content says what a file holds (`formats.format_of`). Raises
    ConfigError if an input stands for no file, cannot be read, is given twice, or could hold two things.
    """
    paths = [path for entry in inputs for path in expand(entry, suffixes)]
    refuse_repeated(paths)
    return [Source(str(path), _settled_state(path), *format_of(path, text_format)) for path in paths]


def _settled_state(path: Path) -> FileState:
    """The state of a file that a later change will alter."""
    if abs(time.time() - path.stat().st_ctime) < _SETTLING_SECONDS:
        time.sleep(_SETTLING_SECONDS)
    return FileState.of(path.stat())


class RecordReader:
    """Iterates over the records of `sources`, from `start` on; blank lines are passed over.

    Of Parquet files the texts of `columns` are read. After each record `position` is the place behind it. A
    record of more than `max_record_bytes` (the bound on memory) raises BadRecordError; with `skips_long` it
    comes without its content, with a `problem`. Raises ConfigError when a file is damaged or changes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        start: Position = Position(),
        max_record_bytes: int = 1 << 26,
        *,
        columns: Sequence[Column] = ("text",),
        skips_long: bool = False,
    ) -> None:
        self.position = start
        self._sources = sources
        self._max_record_bytes = max_record_bytes
        self._columns = columns
        self._skips_long = skips_long
        self._disk_bytes = lambda: 0

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk read so far, those before `start` included."""
        done = sum(source.size for source in self._sources[: self.position.source])
        return done + (self._disk_bytes() if self.position.line else 0)

    def __iter__(self) -> Iterator[Record]:
        while self.position.source < len(self._sources):
            number, source = self.position.source, self._sources[self.position.source]
            with Path(source.path).open("rb") as disk:
                _check_unchanged(source, disk)
                yield from self._records(source, disk)
                _check_unchanged(source, disk)
            self._disk_bytes = lambda: 0
            self.position = Position(number + 1, text_bytes=self.position.text_bytes)

    def _records(self, source: Source, disk: BinaryIO) -> Iterator[Record]:
        if source.format == "parquet":
            yield from self._rows(source)
            return
        stream = decompressed(source.path, disk, source.compression)
        _skip(source, stream, self.position.offset)
        self._disk_bytes = disk.tell
        yield from self._lines(source, stream) if source.format == "jsonl" else self._text(source, stream)

    def _advance(self, offset_bytes: int, text_bytes: int) -> int:
        """Put `position` behind the next line or row. Returns its number."""
        at = self.position
        self.position = Position(at.source, at.line + 1, at.offset + offset_bytes, at.text_bytes + text_bytes)
        return self.position.line

    def _lines(self, source: Source, stream: BinaryIO) -> Iterator[Record]:
        while line := stream.readline(self._max_record_bytes + 1):
            if len(line) > self._max_record_bytes:
                record = self._too_long(source, self.position.line + 1)
                size = len(line) + (0 if line.endswith(b"\n") else _pass_line(stream))
                self._advance(size, size)
                yield record
            elif line.isspace() or line.removeprefix(BOM).isspace():
                self._advance(len(line), len(line))
            else:
                yield Record(source.path, self._advance(len(line), len(line)), line)

    def _text(self, source: Source, stream: BinaryIO) -> Iterator[Record]:
        text = stream.read(self._max_record_bytes + 1)
        too_long = len(text) > self._max_record_bytes
        record = self._too_long(source, 0) if too_long else Record(source.path, 0, text)
        at = self.position
        self.position = Position(at.source + 1, text_bytes=at.text_bytes + len(text))
        yield record

    def _rows(self, source: Source) -> Iterator[Record]:
        file = ParquetTexts(source.path, self._columns)
        self._disk_bytes = lambda: source.size * self.position.line // max(1, file.num_rows)
        for row in file.rows(self.position.line):
            record = Record(source.path, self.position.line + 1, b"", row)
            size = record.size
            if size > self._max_record_bytes:
                record = self._too_long(source, record.line)
            self._advance(0, size)
            yield record

    def _too_long(self, source: Source, line: int) -> Record:
        problem = (
            f"the document is longer than {self._max_record_bytes >> 20} MiB, the bound on memory; is it the "
            "right format? If so, raise --max-document-mib."
        )
        record = Record(source.path, line, b"", problem=problem)
        if not self._skips_long:
            raise BadRecordError(f"{record.place}: {problem}")
        return record


def _check_unchanged(source: Source, disk: BinaryIO) -> None:
    now = FileState.of(os.fstat(disk.fileno()))
    if (now.size, now.inode, now.modified_ns) != (
        source.state.size,
        source.state.inode,
        source.state.modified_ns,
    ):
        raise ConfigError(
            f"{source.path}: changed since it was looked at first. Start again when it is complete."
        )


def _pass_line(stream: BinaryIO) -> int:
    """Read to the end of a line. Returns the number of bytes."""
    count = 0
    while chunk := stream.readline(CHUNK_BYTES):
        count += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return count


def check_columns(sources: Sequence[Source], columns: Sequence[Column]) -> None:
    """Raises ConfigError for a Parquet file that is damaged or does not have what `columns` ask for."""
    for source in sources:
        if source.format == "parquet":
            ParquetTexts(source.path, columns)


def text_bytes(sources: Sequence[Source], columns: Sequence[Column] = ("text",)) -> int:
    """Bytes of text in all sources. Compressed files and columns of Parquet files are read through for it."""
    return sum(_text_bytes(source, columns) for source in sources)


def _text_bytes(source: Source, columns: Sequence[Column]) -> int:
    if source.format == "parquet":
        return ParquetTexts(source.path, columns).text_bytes()
    return _decompressed_size(source) if source.compression else source.size


def _skip(source: Source, stream: BinaryIO, count: int) -> None:
    if not source.compression:
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
        stream, size = decompressed(source.path, disk, source.compression), 0
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
    return size

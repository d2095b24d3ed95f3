"""Tokenizing records in several processes, in the order of the input and in bounded memory.

reader --(batches of records)--> worker processes --(token arrays)--> whoever writes them
          at most two per worker in flight, so memory does not depend on the size of the input
"""

import functools
import hashlib
import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.config import DataFormat
from megatron_ext.data.chat import BadConversationError, ChatTokenizer
from megatron_ext.data.conversations import parse_chat
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.marks import MARKED_DTYPE, marked
from megatron_ext.data.records import BadRecordError, Record, parse_texts
from megatron_ext.data.sources import Position, RecordReader
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.signals import blocked, live_as_long_as_parent

_BATCH_BYTES = 1 << 19
_BATCH_RECORDS = 4096


@dataclass(frozen=True)
class EncodingSettings:
    """What a worker needs to know."""

    tokenizer_type: str
    tokenizer_model: str
    json_keys: tuple[str, ...]
    append_eod: bool
    skip_bad_records: bool
    data_format: DataFormat = "pretraining"


@dataclass(frozen=True)
class Stretch:
    """A batch's stretch of the input: where it ends, what was read from disk by then, and whether a shard
    ends with it."""

    end: Position
    disk_bytes: int
    closes_shard: bool = False
    final: bool = False
    """Whether the input ends with it."""

    content: str = ""
    """Where a shard ends: the `ContentHash` of its records."""


class ContentHash:
    """A hash of records, taken while they are read: it tells an input that was changed from one that was not.

    32 hexadecimal digits of BLAKE2b, which needs no help of the processor to be faster than reading is.
    """

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def add(self, record: Record) -> None:
        """Take in the next record."""
        if record.line and record.columns is None and not record.problem:
            self._state.update(record.data)  # a line has its own end
            return
        for part in (record.problem.encode(), *(record.columns or (record.data,))):
            self._state.update(b"null" if part is None else b"%d:" % len(part))
            self._state.update(part or b"")

    def digits(self) -> str:
        """Of all records so far."""
        return self._state.hexdigest()


def content_hash(reader: RecordReader, end: Position | None) -> str:
    """The hash of what a reader reads from where it stands to `end`; None: to the end of the input."""
    content = ContentHash()
    for record in reader:
        content.add(record)
        if end is not None and reader.position.text_bytes >= end.text_bytes:
            break
    return content.digits()


@dataclass(frozen=True)
class Documents:
    """Tokens of the non-empty documents of a batch, one after the other, and their lengths (int32)."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A batch after tokenizing: documents for each key,
    and messages about the bad records that were skipped."""

    by_key: tuple[Documents, ...]
    bad: tuple[str, ...]


EncodedStream = Generator[tuple[Stretch, Encoded], None, None]


def encode_records(
    reader: RecordReader, settings: EncodingSettings, *, workers: int, shard_text_bytes: int | None
) -> EncodedStream:
    """Tokenize all records of a reader. With one worker this process does it, else as many others do.

    A shard ends with the record that reaches the next multiple of `shard_text_bytes` bytes of input text, and
    with the input. Raises BadRecordError for the first bad record, unless they are skipped.
    """
    encode = functools.partial(_encode, settings)
    batches = _batches(reader, shard_text_bytes)
    if workers == 1:
        return ((stretch, encode(records)) for records, stretch in batches)
    return _in_order(batches, encode, workers)


def _batches(reader: RecordReader, shard_text_bytes: int | None) -> Iterator[tuple[list[Record], Stretch]]:
    def next_boundary(position: Position) -> float:
        return (
            math.inf
            if shard_text_bytes is None
            else (position.text_bytes // shard_text_bytes + 1) * shard_text_bytes
        )

    records: list[Record] = []
    size, end, content = 0, reader.position, ContentHash()
    boundary = next_boundary(end)
    for record in reader:
        if end.text_bytes >= boundary:
            yield records, Stretch(end, reader.disk_bytes, closes_shard=True, content=content.digits())
            records, size, boundary, content = [], 0, next_boundary(end), ContentHash()
        records.append(record)
        content.add(record)
        size, end = size + record.size, reader.position
        if size >= _BATCH_BYTES or len(records) >= _BATCH_RECORDS:
            yield records, Stretch(end, reader.disk_bytes)
            records, size = [], 0
    yield (
        records,
        Stretch(reader.position, reader.disk_bytes, closes_shard=True, final=True, content=content.digits()),
    )


def _in_order(
    batches: Iterator[tuple[list[Record], Stretch]], encode: Callable[[list[Record]], Encoded], workers: int
) -> EncodedStream:
    context = multiprocessing.get_context(
        "spawn"
    )  # a fork could copy a locked lock of a tokenizer library's threads
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=live_as_long_as_parent)
    pending: deque[tuple[Stretch, Future[Encoded]]] = deque()
    try:
        for records, stretch in batches:
            with blocked():  # a worker may start here
                pending.append((stretch, executor.submit(encode, records)))
            if len(pending) >= 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a tokenizing process died, perhaps for lack of memory; use fewer --workers or a smaller "
            "--max-document-mib."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


class _TextEncoder:
    """Documents of texts, one for each key."""

    def __init__(self, settings: EncodingSettings) -> None:
        self._tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
        self.dtype = token_dtype(self._tokenizer.vocab_size)
        self._keys = settings.json_keys
        self._ending = [self._tokenizer.eod] if settings.append_eod else []

    def documents(self, record: Record) -> list[np.ndarray]:
        """Tokens of each key's text; none for an empty text."""
        return [
            np.array(self._tokenizer.encode(text) + self._ending if text else [], self.dtype)
            for text in parse_texts(record, self._keys)
        ]


class _ChatEncoder:
    """Documents of conversations, with marks (`marks`)."""

    dtype = MARKED_DTYPE

    def __init__(self, settings: EncodingSettings) -> None:
        self._tokenizer = ChatTokenizer(Path(settings.tokenizer_model))
        (self._key,) = settings.json_keys

    def documents(self, record: Record) -> list[np.ndarray]:
        """Tokens of the conversation."""
        chat = parse_chat(record, self._key)
        try:
            return [marked(*self._tokenizer.encode(chat.messages, chat.tools))]
        except BadConversationError as error:
            raise BadRecordError(f"{record.place}: {error}") from error


@functools.lru_cache(maxsize=1)
def _encoder(settings: EncodingSettings) -> _TextEncoder | _ChatEncoder:
    return _ChatEncoder(settings) if settings.data_format == "chat" else _TextEncoder(settings)


def _encode(settings: EncodingSettings, records: Sequence[Record]) -> Encoded:
    encoder = _encoder(settings)
    documents: list[list[np.ndarray]] = [[] for _ in settings.json_keys]
    bad: list[str] = []
    for record in records:
        try:
            of_record = encoder.documents(record)
        except BadRecordError as error:
            if not settings.skip_bad_records:
                raise
            bad.append(str(error))
            continue
        for of_key, tokens in zip(documents, of_record, strict=True):
            if len(tokens):
                of_key.append(tokens)
    return Encoded(tuple(_joined(of_key, encoder.dtype) for of_key in documents), tuple(bad))


def _joined(documents: list[np.ndarray], dtype: np.dtype) -> Documents:
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype)
    return Documents(tokens, np.array([len(document) for document in documents], np.int32))

"""What is known of an indexed dataset beside its tokens:
PREFIX.json, written next to PREFIX.bin and PREFIX.idx."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ext.atomic import write_file
from megatron_ext.data.sources import Position
from megatron_ext.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class SourceFile:
    """An input file as it was when it was read: path as given, and bytes on disk."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Shard:
    """Place of a dataset among the shards of one job."""

    index: int
    """Number of shards before this one."""

    final: bool
    """Whether the input ends with this shard."""

    text_bytes: int
    """Aimed-at size of each shard, in bytes of input text."""

    end: Position
    """Where in the input the next shard begins."""


@dataclass(frozen=True)
class DatasetManifest:
    """Contents of PREFIX.json."""

    tokenizer_type: str
    """Kind of tokenizer, as in `data.tokenizer_type`."""

    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint` of the tokenizer that made the dataset."""

    vocab_size: int
    """True vocabulary size of that tokenizer, in tokens."""

    eod: int
    """Its end-of-document token."""

    dtype: str
    """Type of a token in PREFIX.bin: uint16 or int32."""

    append_eod: bool
    """Whether every document ends with eod."""

    documents: int
    """Documents in the dataset; empty ones are left out."""

    tokens: int
    """Tokens in the dataset, those of append_eod included."""

    max_token_id: int
    """Largest token id in the dataset; -1 in an empty one."""

    json_key: str
    """Which key of the JSON lines the text is from."""

    skipped_records: int
    """Records left out because they were no valid documents (--skip-bad-lines)."""

    sources: tuple[SourceFile, ...]
    """Input files, in order."""

    shard: Shard | None = None
    """Place among the shards of a sharded job; None for a whole or merged dataset."""


def manifest_path(prefix: str) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: str, manifest: DatasetManifest) -> None:
    """Write PREFIX.json atomically."""
    text = json.dumps({"format": FORMAT} | asdict(manifest), indent=1)
    write_file(manifest_path(prefix), text.encode() + b"\n")


def read_manifest(prefix: str) -> DatasetManifest | None:
    """Read PREFIX.json; None if there is none. Raises ConfigError if it cannot be understood."""
    path = manifest_path(prefix)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        shard = values.pop("shard")
        sources = tuple(SourceFile(**source) for source in values.pop("sources"))
        return _checked(
            DatasetManifest(**values, sources=sources, shard=None if shard is None else _shard(shard))
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a dataset description ({error}). Make the dataset again with lckv-megatron "
            "preprocess, or delete this file to use the dataset unchecked."
        ) from error


def _shard(values: Mapping[str, Any]) -> Shard:
    return Shard(**{**values, "end": Position(**values["end"])})


def _checked(manifest: DatasetManifest) -> DatasetManifest:
    for field in fields(manifest):
        value = getattr(manifest, field.name)
        if field.type in (str, int, bool) and type(value) is not field.type:
            raise ValueError(f"{field.name}={value!r} is not of type {field.type.__name__}")
    return manifest

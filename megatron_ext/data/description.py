"""What is known of an indexed dataset beside its tokens: PREFIX.dataset.json, next to PREFIX.bin and
PREFIX.idx.

Earlier versions wrote PREFIX.json, which is read too. That name may be anybody's, so such a file counts only
if its content says that it is a description.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lckv.plain_files import read_plain
from lckv.weights.json_file import parse_json
from megatron_ext.atomic import write_file
from megatron_ext.data.parts import Part
from megatron_ext.data.sources import FileState, Position, Source
from megatron_ext.errors import ConfigError

_Part = TypeVar("_Part", "DatasetManifest", "SourceFile", "Shard", Part, Position)

FORMAT = 2
_READ_FORMATS = (1, 2)
_NEEDED = {"tokenizer_type", "tokenizer_fingerprint", "vocab_size", "dtype", "documents", "tokens"}
_PEEK_BYTES = 4096


@dataclass(frozen=True)
class SourceFile:
    """An input file as it was when it was read: path as given, bytes on disk, what was read out of it, and
    what shows that it was not touched since (`FileState`; 0: not known)."""

    path: str
    bytes: int
    format: str = ""
    inode: int = 0
    modified_ns: int = 0
    changed_ns: int = 0

    @classmethod
    def of(cls, source: Source) -> "SourceFile":
        """As the source is now."""
        state = source.state
        return cls(source.path, state.size, source.format, state.inode, state.modified_ns, state.changed_ns)

    @property
    def identity(self) -> tuple[str, int, str]:
        """What must agree for two files to hold the same, whatever was done to them."""
        return self.path, self.bytes, self.format

    @property
    def state(self) -> FileState:
        """When equal, the file was not touched."""
        return FileState(self.bytes, self.inode, self.modified_ns, self.changed_ns)


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
    """Contents of PREFIX.dataset.json."""

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

    tokenizer_splitting: str = ""
    """`Tokenizer.splitting`; "" if not known."""

    tokenizer_content: str = ""
    """Hash of the tokenizer's files; "" if not known."""

    json_keys: tuple[str, ...] = ()
    """All keys that the job took texts from: a record without one of them gives no document to any."""

    skip_bad_records: bool = False
    """Whether bad records were left out instead of stopping."""

    max_document_bytes: int = 0
    """Longest document that was taken; 0 if not known."""

    data_format: str = "pretraining"
    """What the documents are, as in `data.format`. Those of chat have marks (`marks`)."""

    chat_template: str = ""
    """`ChatTokenizer.template` of the template that conversations were written with; "" for texts."""

    content: str = ""
    """`ContentHash` of the records that were read; "" if not known (merged, or of an earlier version)."""

    part: Part | None = None
    """Which part of a job of several machines it is; None for a whole or merged dataset."""


MEANING = (
    "data_format", "chat_template", "tokenizer_fingerprint", "tokenizer_splitting", "vocab_size", "eod",
    "dtype", "append_eod",
)  # fmt: skip
"""Fields in which two manifests must agree for their tokens to mean the same."""


def differences_of_meaning(first: DatasetManifest, second: DatasetManifest) -> list[str]:
    """The fields of `MEANING` that differ; those that one of them does not know ("") do not."""
    pairs = [(name, getattr(first, name), getattr(second, name)) for name in MEANING]
    return [name for name, one, other in pairs if one != other and "" not in (one, other)]


def manifest_path(prefix: str) -> Path:
    """PREFIX.dataset.json."""
    return Path(f"{prefix}.dataset.json")


def existing_manifest(prefix: str) -> Path | None:
    """The file that describes a dataset: PREFIX.dataset.json, or PREFIX.json if it is a description; None
    if there is neither."""
    path, earlier = manifest_path(prefix), Path(f"{prefix}.json")
    if path.exists():
        return path
    return earlier if _is_earlier_description(earlier) else None


def _is_earlier_description(path: Path) -> bool:
    """Looks at the beginning first: the file may be a corpus of any size."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_PEEK_BYTES)
    if not re.match(rb'\{\s*"format": 1,\s*"tokenizer_type"', start):
        return False
    try:
        return _is_description(parse_json(read_plain(path)))
    except (OSError, ValueError):
        return False


def _is_description(values: object) -> bool:
    return isinstance(values, dict) and values.keys() >= _NEEDED


def is_description(path: Path) -> bool:
    """Whether a file's content is the description of a dataset."""
    try:
        return _is_description(parse_json(read_plain(path)))
    except (OSError, ValueError):
        return False


def manifest_bytes(manifest: DatasetManifest) -> bytes:
    """The content of PREFIX.dataset.json."""
    return json.dumps({"format": FORMAT} | asdict(manifest), indent=1).encode() + b"\n"


def write_manifest(prefix: str, manifest: DatasetManifest) -> None:
    """Write PREFIX.dataset.json atomically."""
    write_file(manifest_path(prefix), manifest_bytes(manifest))


def read_manifest(prefix: str) -> DatasetManifest | None:
    """Read the description of a dataset; None if there is none. Raises ConfigError if it cannot be
    understood."""
    path = existing_manifest(prefix)
    if path is None:
        return None
    try:
        values = parse_json(read_plain(path))
        if (version := values.pop("format")) not in _READ_FORMATS:
            raise ValueError(f"its format is {version!r}, not 1 or 2")
        shard = values.pop("shard")
        sources = tuple(_checked(SourceFile(**source)) for source in values.pop("sources"))
        keys = tuple(map(str, values.pop("json_keys", ())))
        place = None if shard is None else _shard(shard)
        part = None if (given := values.pop("part", None)) is None else _checked(Part(**given))
        return _checked(DatasetManifest(**values, sources=sources, shard=place, json_keys=keys, part=part))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a dataset description ({error}). Make the dataset again under another prefix with "
            "lckv-megatron preprocess, or move this file away to use the dataset unchecked."
        ) from error


def _shard(values: Mapping[str, Any]) -> Shard:
    return _checked(Shard(**{**values, "end": _checked(Position(**values["end"]))}))


def _checked(part: _Part) -> _Part:
    """`part` of a description, whose plain fields have the types that they should have, and counts are."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.type in (str, int, bool) and type(value) is not field.type:
            raise ValueError(f"{field.name}={value!r} is not of type {field.type.__name__}")
        if field.type is int and value < (-1 if field.name == "max_token_id" else 0):
            raise ValueError(f"{field.name}={value} is negative")
    return part

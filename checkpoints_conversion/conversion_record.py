"""conversion.json: where converted weights come from and what was done to them. It lies in every folder that
a conversion writes.

What the model is - RoPE base and scaling, epsilon, tie flag, true vocabulary size, sharing map, policy and
its stage - is in its `description`; what the files of the source were, in its `source`.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from lckv.plain_files import open_plain, read_plain
from lckv.sharing.initialization import Initialization
from lckv.weights.json_file import parse_json
from megatron_ext.atomic import write_file

RECORD_NAME = "conversion.json"
SCHEMA_VERSION = 1
SourceFormat = Literal["huggingface", "megatron", "megatron-legacy"]
_PACKAGES = ("lckv-megatron", "torch", "megatron-core", "transformers", "safetensors")


@dataclass(frozen=True)
class ConversionSource:
    """What was converted."""

    format: SourceFormat | str
    """A manifest of an earlier version may have a name that is no longer used."""

    path: str
    """Folder, or name on the Hugging Face Hub."""

    files: Mapping[str, str]
    """sha256 of every file of weights, by its name."""


@dataclass(frozen=True)
class ConversionRecord:
    """The content of conversion.json."""

    description: ModelDescription
    """The model that lies beside the record."""

    source: ConversionSource
    initialization: Initialization | None = None
    """How keys and values of a shared map were made from those of a plain model;
    None where weights are the source's."""

    calibration: Mapping[str, Any] | None = None
    """The text that they were fitted to, where that was so: name and sha256 of the file, tokens used."""

    tokenizer: str | None = None
    """Folder or file of the tokenizer, where one is known."""

    training: Mapping[str, Any] | None = None
    """Of the run that made the source, where it was one:
    its progress, and its settings `train`, `optimizer` and `data`."""

    card: Mapping[str, str] | None = None
    """What the page of the source says of its license and of the model that it was made from, where it has a
    page: see `source_card.py`."""

    previous: "ConversionRecord | None" = None
    """Where the source itself is the result of a conversion: that one's record."""

    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Date and time, UTC, as in ISO 8601."""

    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    """Of Python and of the packages that took part."""

    def to_json(self) -> dict[str, Any]:
        """Fit for `json.dumps`; `from_json` gives the same record back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "description": self.description.to_json(),
            "source": asdict(self.source),
            "initialization": self.initialization,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "tokenizer": self.tokenizer,
            "training": self.training,
            "card": None if self.card is None else dict(self.card),
            "previous": None if self.previous is None else self.previous.to_json(),
            "created": self.created,
            "versions": dict(self.versions),
        }

    def without_places(self) -> "ConversionRecord":
        """For a folder that may be published: of every path on this machine only the last part is left."""
        return self.from_json(_without_places(self.to_json()))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ConversionRecord":
        """The inverse of `to_json`; raises ConversionError."""
        if not isinstance(content, Mapping):
            raise ConversionError("it holds no mapping.")
        fields = dict(content)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConversionError(
                f"schema_version is {version}; this program reads version {SCHEMA_VERSION}."
            )
        try:
            previous = fields.pop("previous")
            return cls(
                description=ModelDescription.from_json(fields.pop("description")),
                source=ConversionSource(**fields.pop("source")),
                previous=None if previous is None else cls.from_json(previous),
                **fields,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"a field is missing or unknown: {error}.") from error


def _without_places(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_places(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_places(value) for value in content]
    return Path(content).name if isinstance(content, str) and Path(content).is_absolute() else content


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that a conversion depends on;
    what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_record(folder: Path, record: ConversionRecord) -> None:
    """Writes conversion.json into `folder`, in full or not at all."""
    write_file(folder / RECORD_NAME, json.dumps(record.to_json(), indent=1).encode())


def read_record(folder: Path) -> ConversionRecord | None:
    """The record in `folder`, None where there is none.
    Raises ConversionError where it cannot be understood."""
    path = folder / RECORD_NAME
    try:
        content = parse_json(read_plain(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} cannot be read: {error}. Restore it, or remove it to go on without."
        ) from error
    try:
        return ConversionRecord.from_json(content)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no record of a conversion: {error}") from error


def hash_weights(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the named files of `folder`, read in pieces."""
    hashes = {}
    for name in names:
        with open_plain(folder / name) as file:
            hashes[name] = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return hashes

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.data.description import (
    Shard,
    SourceFile,
    existing_manifest,
    is_description,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron_ext.data.sources import Position
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import write_dataset

SHARD = {"index": 0, "final": True, "text_bytes": 9, "end": {}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    manifest = read_manifest(prefix)
    assert manifest is not None
    shard = Shard(3, False, 1000, Position(1, 2, 3, 4))
    manifest = replace(
        manifest,
        json_keys=("a", "b"),
        content="f" * 32,
        sources=(SourceFile("a.jsonl", 5, "jsonl", 1, 2, 3),),
        shard=shard,
    )
    write_manifest(prefix, manifest)
    assert read_manifest(prefix) == manifest
    assert read_manifest(f"{prefix}-other") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "its format is 3, not 1 or 2"),
        ({"eod": "0"}, "eod='0' is not of type int"),
        ({"append_eod": 1}, "append_eod=1 is not of type bool"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"sources": None}, "not iterable"),
        ({"tokens": -1}, "tokens=-1 is negative"),
        ({"sources": [{"path": 1, "bytes": 5}]}, "path=1 is not of type str"),
        ({"sources": [{"path": "a", "bytes": "5"}]}, "bytes='5' is not of type int"),
        ({"sources": ["a"]}, "must be a mapping"),
        ({"shard": {**SHARD, "index": "0"}}, "index='0' is not of type int"),
        ({"shard": {**SHARD, "end": {"source": None}}}, "source=None is not of type int"),
        ({"shard": {**SHARD, "end": 3}}, "must be a mapping"),
    ],
)
def test_a_file_that_cannot_be_understood(tmp_path: Path, change: dict[str, object], message: str) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    path = manifest_path(prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ConfigError,
        match=rf"d\.dataset\.json: not a dataset description \(.*{message}.*\)\. Make the dataset again",
    ):
        read_manifest(prefix)


def test_a_truncated_file(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    manifest_path(prefix).write_text('{"format": 1, "eod"')
    with pytest.raises(ConfigError, match="not a dataset description"):
        read_manifest(prefix)


def test_nesting_too_deep(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    manifest_path(prefix).write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"not a dataset description.*move this file away"):
        read_manifest(prefix)


def earlier(prefix: str) -> Path:
    """Turn a description into one of the earlier version: PREFIX.json, without the newer fields."""
    path = manifest_path(prefix)
    values = json.loads(path.read_text())
    newer = (
        "tokenizer_splitting",
        "tokenizer_content",
        "json_keys",
        "skip_bad_records",
        "max_document_bytes",
        "content",
    )
    old = {"format": 1} | {name: value for name, value in values.items() if name not in ("format", *newer)}
    path.unlink()
    Path(f"{prefix}.json").write_text(json.dumps(old, indent=1))
    return Path(f"{prefix}.json")


def test_descriptions_of_earlier_versions_are_read(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    before = read_manifest(prefix)
    path = earlier(prefix)
    assert read_manifest(prefix) == before
    assert existing_manifest(prefix) == path


@pytest.mark.parametrize(
    "content",
    [
        '{"documents": 3, "text_bytes": 5, "python": "3"}',
        '{"text": "a"}\n{"text": "b"}',
        "[1]",
        "{",
        "\0",
        "",
    ],
)
def test_other_files_of_that_name_are_nobodys_description(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.json").write_text(content)
    assert read_manifest(str(tmp_path / "d")) is None


@pytest.mark.parametrize("content", [None, b"[" * 100_000])
def test_descriptions_that_hang_or_are_too_deep(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.dataset.json"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.dataset\.json: not a dataset description .*(a FIFO|too deep)"):
        read_manifest(str(tmp_path / "x"))
    assert not is_description(path)

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.data.manifest import Shard, SourceFile, manifest_path, read_manifest, write_manifest
from megatron_ext.data.sources import Position
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import write_dataset


def test_what_is_written_is_read(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    manifest = read_manifest(prefix)
    assert manifest is not None
    shard = Shard(3, False, 1000, Position(1, 2, 3, 4))
    manifest = replace(manifest, sources=(SourceFile("a.jsonl", 5),), shard=shard)
    write_manifest(prefix, manifest)
    assert read_manifest(prefix) == manifest
    assert read_manifest(f"{prefix}-other") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is not 1"),
        ({"eod": "0"}, "eod='0' is not of type int"),
        ({"append_eod": 1}, "append_eod=1 is not of type bool"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"sources": None}, "not iterable"),
    ],
)
def test_a_file_that_cannot_be_understood(tmp_path: Path, change: dict[str, object], message: str) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    path = manifest_path(prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ConfigError, match=rf"d\.json: not a dataset description \(.*{message}.*\)\. Make the dataset again"
    ):
        read_manifest(prefix)


def test_a_truncated_file(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    manifest_path(prefix).write_text('{"format": 1, "eod"')
    with pytest.raises(ConfigError, match="not a dataset description"):
        read_manifest(prefix)

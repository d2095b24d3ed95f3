"""A rerun keeps an earlier result only if it would make the same now."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.data import preprocessing
from megatron_ext.data.description import read_manifest
from megatron_ext.data.job import PreprocessingJob
from megatron_ext.data.preprocessing import preprocess
from megatron_ext.data.sources import find_sources
from megatron_ext.errors import ConfigError
from tests.lckv.tokenizer_json import TEXTS, write_tokenizer_json


def lines(texts: list[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"text": text, "more": text}).encode() + b"\n" for text in texts)


@pytest.fixture
def make(sentencepiece_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(lines(TEXTS[:30]))
    Path("b.jsonl").write_bytes(lines(TEXTS[30:]))

    def run(
        prefix: str = "out", *, overwrite: bool = False, text_format: Any = "auto", **options: Any
    ) -> Any:
        values = {"tokenizer_type": "sentencepiece", "tokenizer_model": str(sentencepiece_model), **options}
        inputs = values.pop("inputs", ["a.jsonl", "b.jsonl"])
        sources = tuple(find_sources(inputs, text_format=text_format))
        return preprocess(PreprocessingJob(sources, prefix, **values), overwrite=overwrite)

    return run


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl"])
def test_an_equally_long_edit_is_noticed(
    make: Callable[..., Any], shards: int | None, restored: bool, name: str
) -> None:
    """Also where the edit's time was set back."""
    make(shards=shards)
    before = os.stat(name)
    Path(name).write_bytes(Path(name).read_bytes().replace(b"hello", b"HELLO"))
    if restored:
        os.utime(name, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        ConfigError, match=r"is of another job: the content of the input differs.*--overwrite to begin"
    ):
        make(shards=shards)
    make(shards=shards, overwrite=True)
    make(shards=shards)


@pytest.mark.parametrize("shards", [None, 3])
def test_a_file_that_was_touched_is_read_and_found_the_same(
    make: Callable[..., Any], shards: int | None
) -> None:
    before = make(shards=shards)
    for name in ("a.jsonl", "b.jsonl"):
        Path("copy").write_bytes(Path(name).read_bytes())
        Path("copy").replace(name)
    assert make(shards=shards) == before


def test_what_was_not_touched_is_not_read_again(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make()
    monkeypatch.setattr(preprocessing, "content_hash", lambda reader, end: pytest.fail("read"))
    assert make() == before


def test_an_edit_behind_a_complete_shard_is_not_noticed_there(make: Callable[..., Any]) -> None:
    """A shard answers for its own stretch; the others are made anew."""
    make(shards=3)
    for path in Path().glob("out-0000[12]*"):
        path.unlink()
    Path("b.jsonl").write_bytes(Path("b.jsonl").read_bytes().replace(b"hello", b"HELLO"))
    first = read_manifest("out-00000")
    assert make(shards=3)["out-00000"] == first


def test_every_option_that_matters_is_noticed(make: Callable[..., Any], tmp_path: Path) -> None:
    make()
    write_tokenizer_json(tmp_path / "tokenizer.json")
    for changes, what in (
        ({"append_eod": False}, "append_eod"),
        ({"json_keys": ("more",)}, "json_key, json_keys"),
        ({"inputs": ["a.jsonl"]}, "sources"),
        ({"inputs": ["b.jsonl", "a.jsonl"]}, "sources"),
        ({"text_format": "text"}, "sources"),
        ({"max_document_bytes": 1 << 20}, "max_document_bytes"),
        (
            {"tokenizer_type": "huggingface", "tokenizer_model": "tokenizer.json"},
            "tokenizer_fingerprint, tokenizer_splitting, vocab_size, eod, tokenizer_type, tokenizer_content",
        ),
    ):
        with pytest.raises(ConfigError, match=f"out is of another job: {what} differs."):
            make(**changes)
    make(workers=2)
    make(skip_bad_records=True)
    make(max_document_bytes=1 << 27)


def test_several_keys_of_another_job(make: Callable[..., Any]) -> None:
    make(json_keys=("text", "more"))
    Path("out_text.dataset.json").unlink()
    for name in ("bin", "idx"):
        Path(f"out_text.{name}").unlink()
    before = Path("out_more.bin").read_bytes()
    with pytest.raises(ConfigError, match="out_more is of another job: append_eod differs"):
        make(json_keys=("text", "more"), append_eod=False)
    assert Path("out_more.bin").read_bytes() == before
    make(json_keys=("text", "more"))


def test_another_splitting_of_the_same_vocabulary_is_noticed(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json")
    tokenizer = {"tokenizer_type": "huggingface", "tokenizer_model": "tokenizer.json"}
    make(**tokenizer)
    values = json.loads(path.read_text())
    values["model"]["merges"] = values["model"]["merges"][1:]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="another job: tokenizer_splitting, tokenizer_content differs"):
        make(**tokenizer)


def test_skipped_records_belong_to_the_result(make: Callable[..., Any]) -> None:
    deep = b'{"text": ' + b"[" * 200_000 + b"\n"
    long = b'{"text": "' + b"x" * 200_000 + b'"}\n'
    Path("a.jsonl").write_bytes(lines(TEXTS[:30]) + deep + long + b"\n" + b'{"text": 5}\n')
    bad = {"skip_bad_records": True, "max_document_bytes": 100_000}
    made = make(**bad)["out"]
    assert (made.documents, made.skipped_records) == (60, 3)
    assert make(**bad, workers=2)["out"] == made
    with pytest.raises(ConfigError, match="another job: skip_bad_records differs"):
        make(max_document_bytes=100_000)
    with pytest.raises(ConfigError, match="another job: max_document_bytes differs"):
        make(skip_bad_records=True)
    with pytest.raises(ConfigError, match=r"a.jsonl:31: lists or objects in one another, too deep"):
        make("other", max_document_bytes=1_000_000)
    with pytest.raises(ConfigError, match=r"a.jsonl:31: the document is longer than 0 MiB"):
        make("other", max_document_bytes=100_000)


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_like_json_lines(make: Callable[..., Any], workers: int) -> None:
    expected = make("expected", json_keys=("text", "more"), shards=3)
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        pq.write_table(
            pa.table({"text": texts, "id": range(30), "more": texts}), f"{name}.parquet", row_group_size=4
        )
    job = {"inputs": ["*.parquet"], "json_keys": ("text", "more"), "shards": 3, "workers": workers}
    made = make(**job)
    assert sum(manifest.documents for manifest in made.values()) == 120
    joined = [
        b"".join(Path(f"{prefix}.bin").read_bytes() for prefix in part if "text" in prefix)
        for part in (expected, made)
    ]
    assert joined[0] == joined[1]
    for path in Path().glob("out-0000[12]*"):
        path.unlink()
    assert make(**job) == made
    with pytest.raises(
        ConfigError, match=r"a.parquet: no column 'body'; the columns are 'text', 'id', 'more'"
    ):
        make("other", inputs=["*.parquet"], json_keys=("body",))

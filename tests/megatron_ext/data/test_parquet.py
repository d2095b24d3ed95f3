"""Documents in the rows of Parquet files."""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.data import parquet
from megatron_ext.data.records import BadRecordError, parse_texts
from megatron_ext.data.sources import RecordReader, find_sources, text_bytes
from megatron_ext.errors import ConfigError

TEXTS = [f"document {number} é" for number in range(50)]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(
        tmp_path / "a.parquet", {"id": range(50), "text": TEXTS, "title": TEXTS[::-1]}, row_group_size=7
    )


def texts(path: Path, keys: list[str], **options: Any) -> list[list[str]]:
    return [
        parse_texts(record, keys)
        for record in RecordReader(find_sources([str(path)]), columns=keys, **options)
    ]


def test_rows_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 3)
    assert texts(path, ["title", "text"]) == [list(pair) for pair in zip(TEXTS[::-1], TEXTS, strict=True)]
    assert text_bytes(find_sources([str(path)])) == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("name", ["b", "data.txt", "data.jsonl"])
def test_the_content_says_so(path: Path, name: str) -> None:
    path.rename(path.with_name(name))
    assert texts(path.with_name(name), ["text"])[3] == [TEXTS[3]]
    with pytest.raises(
        ConfigError, match="is a Parquet file, but --text-format is text; leave that option out"
    ):
        find_sources([str(path.with_name(name))], text_format="text")


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 49, 50])
def test_a_reader_goes_on_where_another_stopped(
    path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 3)
    sources = find_sources([str(path)])
    first = RecordReader(sources)
    records = list(islice(first, count))
    assert first.disk_bytes <= path.stat().st_size
    second = RecordReader(sources, first.position)
    assert records + list(second) == list(RecordReader(sources))
    assert second.disk_bytes == path.stat().st_size
    assert second.position.text_bytes == text_bytes(sources)


def test_types_of_columns(tmp_path: Path) -> None:
    plain = pa.array(TEXTS)
    for number, column in enumerate(
        (plain.dictionary_encode(), plain.cast(pa.large_string()), plain.cast(pa.binary()))
    ):
        assert texts(write(tmp_path / f"{number}", {"text": column}), ["text"]) == [[text] for text in TEXTS]


def test_rows_that_are_no_documents(tmp_path: Path) -> None:
    column = pa.array(["one", None, "x" * 3_000_000, "\ufeffkept"])
    bad = pa.array([b"\xff", b"", b"", b""])
    path = write(tmp_path / "a", {"text": column, "bad": bad})
    records = list(RecordReader(find_sources([str(path)]), max_record_bytes=100, skips_long=True))
    assert parse_texts(records[3], ["text"]) == ["\ufeffkept"]
    for number, message in ((1, r"a:2: 'text' is not a text but null"), (2, r"a:3: the document is longer")):
        with pytest.raises(BadRecordError, match=message):
            parse_texts(records[number], ["text"])
    with pytest.raises(BadRecordError, match="a:3: the document is longer than 0 MiB"):
        list(RecordReader(find_sources([str(path)]), max_record_bytes=100))
    with pytest.raises(BadRecordError, match=r"a:1: not UTF-8 text \(byte 0\)"):
        texts(path, ["bad"])


def test_bad_columns_and_files(path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'body'; the columns are 'id', 'text', 'title'"):
        texts(path, ["body"])
    with pytest.raises(ConfigError, match="column 'id' holds no texts but int64"):
        texts(path, ["id"])
    whole = path.read_bytes()
    for content in (whole[:-30], whole[:60] + b"\xff" * 200 + whole[260:]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.parquet: truncated or damaged \("):
            texts(path, ["text"])


def test_without_pyarrow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ConfigError, match=r"needs pyarrow; install it with pip install 'lckv-megatron\[parquet\]'"
    ):
        texts(path, ["text"])

"""What a file holds is seen from its content; what is doubtful is refused."""

import gzip
import io
import json
import lzma
import tarfile
from itertools import product
from pathlib import Path

import pytest
import zstandard

from megatron_ext.data.records import parse_texts
from megatron_ext.data.sources import RecordReader, find_sources
from megatron_ext.errors import ConfigError
from tests.thinning import thinned

LINES = b'{"text": "one"}\n{"text": "two"}\n'
BOM = b"\xef\xbb\xbf"
LONG = b'{"text": "' + b"x" * 200_000 + b'"}\n'


def texts_of(path: Path) -> list[str]:
    return [
        text for record in RecordReader(find_sources([str(path)])) for text in parse_texts(record, ["text"])
    ]


NAMES = ["wiki_00", "part-0.json", "part.00", "corpus", "c4-00000-of-00002", "a.JSONL"]
BEGINNINGS = [b"", BOM, b"\n", b" \r\n\t\n", BOM + b"\n"]


@pytest.mark.parametrize(
    ("inside", "pack", "before", "name"),
    thinned(product([False, True], ["", ".gz", ".zst"], BEGINNINGS, NAMES), 7),  # by day each of a list
)
def test_json_lines_by_their_content(
    tmp_path: Path, name: str, before: bytes, pack: str, inside: bool
) -> None:
    """A folder is treated as its glob."""
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[pack]
    (tmp_path / f"{name}{pack}").write_bytes(compress(before + LINES))
    assert texts_of(tmp_path if inside else tmp_path / f"{name}{pack}") == ["one", "two"]


@pytest.mark.parametrize(
    "content", [LONG, LONG + LINES, b'{"text": "one"}', b"{}\n" + LINES, b'{"a": ' + b"[" * 99_999]
)
def test_first_lines_of_any_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wiki_00").write_bytes(content)
    assert find_sources([str(tmp_path)])[0].format == "jsonl"


@pytest.mark.parametrize("before", [b"", BOM, b"\n", b"\n \n" + BOM])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.data", "a.txt.gz"])
@pytest.mark.parametrize("inside", [False, True])
def test_json_lines_by_another_name_are_doubtful(
    tmp_path: Path, before: bytes, name: str, inside: bool
) -> None:
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(before + LINES))
    path = str(tmp_path if inside else tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"looks like JSON lines but has another name; say --text-format jsonl or"
    ):
        find_sources([path])
    assert find_sources([path], text_format="jsonl")[0].format == "jsonl"
    assert find_sources([path], text_format="text")[0].format == "text"


@pytest.mark.parametrize(
    "content", [b'[{"text": "one"}]', b'[\n {"text": 1}\n]', b'{\n "text": "one"\n}', b'{"a": 1}\nmore']
)
@pytest.mark.parametrize("name", ["a.json", "a", "a.txt", "a.json.gz"])
def test_json_that_is_not_json_lines(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ConfigError, match=r"looks like JSON, but not like JSON lines.*say --text-format"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize(
    "content", [b"plain words", BOM + b"words", b"\n\nwords", b"{braces} in TeX", b"[a link](x)", b"", b" \n"]
)
@pytest.mark.parametrize("name", ["a", "a.txt", "a.py.gz", "README"])
def test_texts(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts_of(tmp_path) == [content.removeprefix(BOM).decode()]


def test_a_number_is_no_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("5")
    with pytest.raises(ConfigError, match="not like JSON lines"):
        find_sources([str(tmp_path)])


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"words"))
    return file.getvalue()


def packed(content: bytes) -> bytes:
    """Without the time of day, so that the tests have the same names in every process."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", lzma.compress(b"words"), "is compressed by bzip2, xz or lz4; use gzip or zstd"),
        ("a.txt.gz", packed(packed(b"words")), "is compressed twice; decompress it once"),
        ("a.tar.gz", packed(tar()), "is an archive; unpack it"),
        ("a.zip", b"PK\x03\x04....", "is an archive; unpack it"),
        ("a.arrow", b"ARROW1\0\0...", "is an Arrow file"),
        ("a.bin", b"\x01\x00\x02\x00", "is no UTF-8 text but binary data, or text in UTF-16"),
        ("a.txt", "\ufeffwords".encode("utf-16-le"), "is no UTF-8 text but binary data, or text in UTF-16"),
        ("a.txt.gz", b"words", "a.txt.gz: truncated or damaged .its name says gzip, its content does not"),
        ("a.jsonl.zst", b"", "a.jsonl.zst: truncated or damaged .it is empty"),
        ("a.parquet", b"words", "is no Parquet file, as its name says"),
        ("a.parquet.gz", packed(b"PAR1"), "is a Parquet file, compressed once more"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match=message):
            find_sources([str(path)])


def test_compression_is_seen_from_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(LINES))
    (tmp_path / "b.jsonl.gz").write_bytes(zstandard.compress(json.dumps({"text": "three"}).encode()))
    assert texts_of(tmp_path) == ["one", "two", "three"]

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.records import BadRecordError, Record, parse_texts
from megatron_ext.data.sources import FileState, Position, RecordReader, find_sources, text_bytes
from megatron_ext.errors import ConfigError

LINES = b"".join(json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(500))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The same 500 lines plain, as two gzip members and as two zstd frames, and texts in directories."""
    folder = tmp_path / "corpus"
    (folder / "inner" / ".hidden").mkdir(parents=True)
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    (folder / "c.jsonl.zst").write_bytes(compress(LINES[:half]) + compress(LINES[half:]))
    (folder / "inner" / "d.txt").write_text("a text\n")
    (folder / "inner" / "e.md").write_text("# another\n")
    (folder / "inner" / ".hidden" / "f.txt").write_text("hidden")
    return folder


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_directories_globs_and_files_in_order(corpus: Path) -> None:
    sources = find_sources([str(corpus)])
    assert names([source.path for source in sources]) == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
        "d.txt",
        "e.md",
    ]
    assert [source.format for source in sources] == ["jsonl", "jsonl", "jsonl", "text", "text"]
    sources = find_sources(
        [str(corpus / "inner" / "*.md"), str(corpus / "[ba].*"), str(corpus / "c.jsonl.zst")]
    )
    assert names([source.path for source in sources]) == ["e.md", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    assert names([source.path for source in find_sources([str(corpus)], suffixes=[".txt"])]) == ["d.txt"]


def test_inputs_that_stand_for_nothing(corpus: Path) -> None:
    for entry in ("nothing.jsonl", "nothing*.jsonl", "/nonexistent/"):
        with pytest.raises(ConfigError, match="stands for no file"):
            find_sources([entry])
    with pytest.raises(ConfigError, match=r"no name ends with \.rst"):
        find_sources([str(corpus)], suffixes=[".rst"])


def test_json_lines_under_another_name_are_not_taken_for_a_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.data"
    path.write_bytes(LINES)
    with pytest.raises(ConfigError, match="looks like JSON lines"):
        find_sources([str(path)])
    for text_format in ("jsonl", "text"):
        assert find_sources([str(path)], text_format=text_format)[0].format == text_format


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"])
def test_all_lines_are_read(corpus: Path, name: str) -> None:
    sources = find_sources([str(corpus / name)])
    records = list(RecordReader(sources))
    assert b"".join(record.data for record in records) == LINES
    assert [record.line for record in records] == list(range(1, 501))
    assert text_bytes(sources) == len(LINES)


def test_a_reader_goes_on_where_another_stopped(corpus: Path) -> None:
    sources = find_sources([str(corpus)])
    all_records = list(RecordReader(sources))
    assert len(all_records) == 1502

    @given(st.integers(0, len(all_records)))
    def check(count: int) -> None:
        first = RecordReader(sources)
        records = list(islice(first, count))
        second = RecordReader(sources, first.position)
        assert records + list(second) == all_records
        assert second.disk_bytes == sum(source.size for source in sources)
        assert second.position.text_bytes == 3 * len(LINES) + len(b"a text\n# another\n")

    check()


def test_blank_lines_count_but_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n  \n{"text": "b"}')
    assert [record.line for record in RecordReader(find_sources([str(path)]))] == [2, 4]


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_compressed_files(corpus: Path, name: str, damage: str) -> None:
    path = corpus / name
    data = bytearray(path.read_bytes())
    middle = len(data) // 4
    path.write_bytes(
        data[:middle] if damage == "truncated" else data[:middle] + b"\xff" * 40 + data[middle + 40 :]
    )
    with pytest.raises(ConfigError, match=rf"{name}: truncated or damaged"):
        list(RecordReader(find_sources([str(path)])))


def test_a_compressed_file_that_has_shrunk(corpus: Path) -> None:
    sources = find_sources([str(corpus / "b.jsonl.gz")])
    reader = RecordReader(sources)
    list(islice(reader, 400))
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(LINES[:100]))
    with pytest.raises(ConfigError, match=r"b.jsonl.gz: changed since it was looked at first"):
        list(RecordReader(sources, reader.position))
    with pytest.raises(ConfigError, match="shorter than when it was read before"):
        list(RecordReader(find_sources([str(corpus / "b.jsonl.gz")]), reader.position))


def test_a_file_that_grows_while_it_is_read(corpus: Path) -> None:
    records = iter(RecordReader(find_sources([str(corpus / "a.jsonl")])))
    next(records)
    with (corpus / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "more"}\n')
    with pytest.raises(ConfigError, match=r"a.jsonl: changed since it was looked at first"):
        list(records)


def test_an_edit_right_after_a_file_was_read_shows(tmp_path: Path) -> None:
    """Although the file system's clock may not have moved on since the file was written."""
    for _ in range(20):
        path = tmp_path / "a.txt"
        path.write_text("one")
        before = find_sources([str(path)])
        list(RecordReader(before))
        path.write_text("two")
        assert FileState.of(path.stat()) != before[0].state


def test_long_records_are_passed_over_on_request(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "b"}\n')
    (tmp_path / "long.txt").write_text("x" * 3_000_000)
    sources = find_sources([str(path), str(tmp_path / "long.txt")])
    reader = RecordReader(sources, max_record_bytes=100, skips_long=True)
    records = list(reader)
    assert [(record.line, len(record.data)) for record in records] == [(1, 14), (2, 0), (3, 14), (0, 0)]
    for record in (records[1], records[3]):
        with pytest.raises(BadRecordError, match=f"{record.place}: the document is longer than 0 MiB"):
            parse_texts(record, ["text"])
    second = RecordReader(sources, Position(0, 1, 14, 14), 100, skips_long=True)
    assert list(second) == records[1:]


def test_a_byte_order_mark_is_no_record(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    path = tmp_path / "bom.jsonl"
    path.write_bytes(bom + b"\n" + bom + b'{"text": "a"}\r\n')
    assert [parse_texts(record, ["text"]) for record in RecordReader(find_sources([str(path)]))] == [["a"]]


def test_a_document_longer_than_the_bound(corpus: Path) -> None:
    for name, place in (("a.jsonl", r"a.jsonl:1: "), ("inner/d.txt", "d.txt: ")):
        with pytest.raises(ConfigError, match=f"{place}the document is longer than"):
            list(RecordReader(find_sources([str(corpus / name)]), max_record_bytes=5))


def test_texts_of_records() -> None:
    assert parse_texts(Record("x", 1, b'{"a": "\xc3\xa9", "b": "2"}'), ("b", "a")) == ["2", "é"]
    assert parse_texts(Record("x", 0, "\ufeffé".encode()), ("text",)) == ["é"]


@pytest.mark.parametrize(
    ("line", "data", "message"),
    [
        (7, b'{"text": ', r"^x:7: not valid JSON \(Expecting value"),
        (7, b"\xff\xfe{}", r"^x:7: not valid JSON"),
        (7, b'{"text": ' + b"[" * 200_000, "^x:7: lists or objects in one another, too deep to be read"),
        (7, b'["text"]', "^x:7: a JSON object is needed, not list"),
        (7, b'{"content": "a", "id": 1}', "^x:7: no key 'text'; the keys are 'content', 'id'"),
        (7, b'{"text": 5}', "^x:7: 'text' is not a text but int"),
        (7, b'{"text": "\\ud800"}', "^x:7: 'text': character 0 is .*half of a surrogate pair"),
        (0, b"ok \xff", r"^x: not UTF-8 text \(byte 3\)"),
    ],
)
def test_bad_records(line: int, data: bytes, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        parse_texts(Record("x", line, data), ("text",))

"""Windows predict every token once, with the context that was asked for."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.generation.loading import load_tokenizer
from lckv_megatron.scoring.text_windows import Coder, Text, read_texts, rows_of_texts, whole_texts
from megatron_ext.errors import ConfigError
from tests.lckv.models.folders import save_folder


@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_every_token_but_the_first_is_predicted_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = list(Text(list(range(length)), length).windows(context, stride))
    assert [token for window in windows for token in window.tokens[-window.predicted :]] == list(
        range(1, length)
    )
    assert all(1 <= window.predicted < len(window.tokens) <= context + 1 for window in windows)
    assert all(window.predicted == stride for window in windows[1:-1])
    # As much context as there is: none could begin earlier.
    assert all(len(window.tokens) == context + 1 or window.tokens[0] == 0 for window in windows)


def test_bytes_are_those_of_what_is_predicted(tmp_path: Path) -> None:
    for name in ("without", "begins"):
        save_folder(tmp_path / name, begins=name == "begins")
    without, begins = (load_tokenizer(tmp_path / name) for name in ("without", "begins"))
    text = "hällo wörld, hällo"
    coder = Coder.of_huggingface(begins)
    assert coder.begin == begins.bos_token_id
    whole = coder.text(text, 1000)
    assert whole is not None
    assert whole.ids == begins(text).input_ids
    assert whole.num_bytes == len(text.encode())
    part = coder.text(text, 4)
    assert part is not None
    assert part.ids == whole.ids[:5]
    assert part.num_bytes == len(begins.decode(part.ids[1:]).encode())
    bare = Coder.of_huggingface(begins, begins=False).text(text, 1000)
    assert bare == Coder.of_huggingface(without).text(text, 1000)
    assert bare is not None
    assert bare.ids == whole.ids[1:]
    assert bare.num_bytes == len(text.encode()) - len("h")
    assert coder.text("", 1000) is None
    assert Coder.of_huggingface(without).text("h", 1000) is None


def test_texts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntext\n")
    (tmp_path / "b.jsonl").write_text('{"content": "first"}\n\n{"content": "second"}\n')
    paths = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    assert list(read_texts(paths, "content")) == ["one\ntext\n", "first", "second"]
    with pytest.raises(ConfigError, match=r"b.jsonl:1: no key 'text'; the keys are 'content'"):
        list(read_texts(paths, "text"))
    with pytest.raises(ConfigError, match="stands for no file"):
        list(read_texts(["nowhere.txt"], "text"))


def test_texts_of_files_without_a_telling_name(tmp_path: Path) -> None:
    lines = '{"text": "first"}\n{"text": "second"}\n'
    (tmp_path / "wiki_00").write_text(lines)
    pq.write_table(pa.table({"text": ["third"]}), tmp_path / "part.parquet")
    assert list(read_texts([str(tmp_path)], "text")) == ["third", "first", "second"]
    (tmp_path / "wiki_00").rename(tmp_path / "wiki.txt")
    with pytest.raises(ConfigError, match="say --text-format jsonl or text"):
        list(read_texts([str(tmp_path)], "text"))
    assert list(read_texts([str(tmp_path / "wiki.txt")], "text", "text")) == [lines]


def test_no_more_is_read_than_is_needed() -> None:
    coder = Coder(encode=lambda text: list(map(ord, text)), decode=lambda ids: "".join(map(chr, ids)))

    def texts() -> Iterator[str]:
        yield from ("abc", "", "abcdef")
        raise AssertionError("read on")

    assert [text.ids for text in whole_texts(texts(), coder, 5)] == [[97, 98, 99], [97, 98, 99, 100]]
    rows = list(rows_of_texts(texts(), coder, count=3, length=2))
    assert [text.ids for text in rows] == [[97, 98], [97, 98], [99, 100]]
    with pytest.raises(ConfigError, match="there are 1 rows of 3 tokens; 2 are needed"):
        list(rows_of_texts(["abcd"], coder, count=2, length=3))

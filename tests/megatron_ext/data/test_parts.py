from itertools import pairwise
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from megatron_ext.data.parts import Part, take_part
from megatron_ext.data.sources import FileState, Source, find_sources
from megatron_ext.errors import ConfigError


def files(sizes: list[int]) -> list[Source]:
    return [Source(f"{i}", FileState(size, i, 0, 0), "jsonl", None) for i, size in enumerate(sizes)]


def test_parts_are_neighbouring_files_of_about_equal_size() -> None:
    sources = files([5, 1, 1, 1, 1, 1, 4, 1])
    taken = [[source.path for source in take_part(sources, index, 3)[1]] for index in range(3)]
    assert taken == [["0"], ["1", "2", "3", "4", "5"], ["6", "7"]]


@hypothesis.given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.data())
def test_every_file_is_in_one_part_and_no_part_is_empty(sizes: list[int], data: st.DataObject) -> None:
    sources = files(sizes)
    count = data.draw(st.integers(1, len(sizes)))
    parts = [take_part(sources, index, count) for index in range(count)]
    assert [source for _, taken in parts for source in taken] == sources
    assert all(taken for _, taken in parts)
    assert {part.files for part, _ in parts} == {parts[0][0].files}


@hypothesis.given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.data())
def test_no_part_is_off_by_more_than_the_largest_file(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    taken = [sum(s.size for s in take_part(files(sizes), index, count)[1]) for index in range(count)]
    if all(size * count <= sum(sizes) for size in sizes):  # no file is more than a part by itself
        assert max(taken) <= sum(sizes) / count + max(sizes)


def test_the_hash_of_the_files_tells_lists_apart(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    lists = [find_sources([str(tmp_path / name) for name in names]) for names in (["a.jsonl"], ["b.jsonl"])]
    (tmp_path / "a.jsonl").write_text('{"text": "xy"}\n')
    lists.append(find_sources([str(tmp_path / "a.jsonl")]))
    hashes = [take_part(sources, 0, 1)[0].files for sources in lists]
    assert all(first != second for first, second in pairwise([*hashes, hashes[0]]))


def test_where_a_part_goes() -> None:
    assert Part(3, 16, "").prefix("data/corpus") == "data/corpus-00003-of-00016"


def test_more_parts_than_files() -> None:
    with pytest.raises(ConfigError, match=r"--part 0/4: the input has only 3 file\(s\).* at most 3 part"):
        take_part(files([1, 1, 1]), 0, 4)

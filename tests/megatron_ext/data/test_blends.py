import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import DataConfig
from megatron_ext.data.blends import (
    Blend,
    SplitSources,
    deal_all_samples,
    deal_samples,
    deal_without_repeats,
    parse_blend,
    parse_split,
    split_sources,
)
from megatron_ext.errors import ConfigError

weights_of = st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 10)), min_size=1, max_size=8)
sizes_of = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def counts_of(source: np.ndarray, sources: int) -> np.ndarray:
    return np.bincount(source, minlength=sources)


def numbers_are_consecutive(source: np.ndarray, number: np.ndarray) -> bool:
    return all(
        number[source == which].tolist() == list(range((source == which).sum()))
        for which in set(source.tolist())
    )


@given(weights_of, st.integers(1, 400))
def test_every_source_gets_its_share(weights: list[float], size: int) -> None:
    source, number = deal_samples(weights, size)
    assert len(source) == size
    assert numbers_are_consecutive(source, number)
    shares = np.array(weights) / sum(weights)
    for k in (size // 3, size):
        # Each sample goes to the source that is furthest behind; the classical bound of that rule is
        # harmonic.
        allowed = 1 + sum(1 / rank for rank in range(1, len(weights) + 1))
        assert np.abs(counts_of(source[:k], len(weights)) - shares * k).max() < allowed


@given(weights_of, st.integers(1, 300), st.integers(0, 200))
def test_drawing_more_does_not_change_the_first(weights: list[float], size: int, more: int) -> None:
    for first, longer in zip(deal_samples(weights, size), deal_samples(weights, size + more), strict=True):
        assert np.array_equal(first, longer[:size])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 20))
def test_whole_shares_are_met_to_one_sample(weights: list[int], times: int) -> None:
    source, _ = deal_samples(weights, times * sum(weights))
    assert np.abs(counts_of(source, len(weights)) - np.array(weights) * times).max() <= 1


@given(sizes_of)
def test_all_samples_once(sizes: list[int]) -> None:
    source, number = deal_all_samples(sizes)
    assert counts_of(source, len(sizes)).tolist() == sizes
    assert numbers_are_consecutive(source, number)


@given(st.data(), sizes_of)
def test_as_many_as_there_are_without_repeats(data: st.DataObject, sizes: list[int]) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    source, number = deal_without_repeats(weights, sizes)
    counts = counts_of(source, len(sizes))
    assert (counts <= np.array(sizes)).all()
    assert numbers_are_consecutive(source, number)
    longer, _ = deal_samples(weights, len(source) + 1)
    assert (counts_of(longer, len(sizes)) > np.array(sizes)).any()


def test_reading_blends() -> None:
    assert parse_blend("data.data_path", ()) is None
    assert parse_blend("data.data_path", ("a", "b/c")) == Blend(("a", "b/c"), None)
    assert parse_blend("data.data_path", ("a", "b")) == Blend(("a", "b"), None)
    assert parse_blend("data.data_path", ("0.3", "a", "7e-1", "b")) == Blend(("a", "b"), (0.3, 0.7))


def test_words_in_one_entry(tmp_path: Path) -> None:
    read = [parse_blend("data.data_path", entries) for entries in (("0.3 a 7e-1 b",), ("0.3 a", "7e-1 b"))]
    assert read == [Blend(("a", "b"), (0.3, 0.7))] * 2
    for name in ("a", "b", "2024 my corpus"):
        (tmp_path / f"{name}.bin").touch()
    a, b, spaced = (f"{tmp_path}/{name}" for name in ("a", "b", "2024 my corpus"))
    assert parse_blend("data.data_path", (f"{a} {b}",)) == Blend((a, b), None)
    assert parse_blend("data.data_path", (spaced,)) == Blend((spaced,), None)
    assert parse_blend("data.data_path", ("0.3", spaced, "1", a)) == Blend((spaced, a), (0.3, 1))
    assert parse_blend("data.data_path", (f"0.3 '{spaced}' 1 {a}",)) == Blend((spaced, a), (0.3, 1))
    missing = f"{tmp_path}/my corpus"
    assert parse_blend("data.data_path", (missing,)) == Blend((missing,), None)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("0.3 a b",), "entry 3 is 'b', but a weight belongs there"),
        (("0.3 a 0.7",), "no prefix follows the last weight, 0.7"),
        (("0.5",), "no prefix follows the last weight, 0.5"),
        (("nan a 1 b",), "the weight of a is nan, but must be > 0"),
        (("-1 a 2 b",), "the weight of a is -1, but must be > 0"),
        (("0.3", "a", "b"), "entry 3 is 'b', but a weight belongs there"),
        (("a", "0.3"), "entry 1 is 'a', but a weight belongs there"),
        (("0.3", "0.7"), "entry 2 is '0.7', but a prefix belongs there"),
        (("0.3", "a", "0.7"), "no prefix follows the last weight, 0.7"),
        (("0", "a", "1", "b"), "the weight of a is 0, but must be > 0"),
        (("-1", "a"), "the weight of a is -1, but must be > 0"),
        (("nan", "a"), "the weight of a is nan, but must be > 0"),
        (("inf", "a"), "the weight of a is inf, but must be > 0"),
        (("a", "b", "a"), "a is given twice"),
        (("a", "b", "./a"), r"./a is given twice \(the same dataset as a\)"),
        (("0.5", "d/../a", "0.5", "a"), r"a is given twice \(the same dataset as d/../a\)"),
        (("a", ""), "prefix 2 is empty"),
        (tuple(f"p{number}" for number in range(32768)), "32768 datasets, but at most 32767"),
    ],
)
def test_odd_blends(entries: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.data_path: {message}"):
        parse_blend("data.data_path", entries)


def test_shares_of_the_splits() -> None:
    assert parse_split("969,30,1") == (0, 0.969, 0.999, 1)
    assert parse_split("100") == (0, 1, 1, 1)
    assert parse_split("1, 1") == (0, 0.5, 1, 1)
    for bad in ("", "a,b,c", "1,2,3,4", "-1,2,1", "0,0,0", "inf,1,1"):
        with pytest.raises(ConfigError, match=r"data\.split=.* must be one to three shares"):
            parse_split(bad)


@given(st.integers(0, 10_000), st.tuples(st.integers(0, 999), st.integers(0, 99), st.integers(0, 9)))
def test_splits_cover_the_documents_once(count: int, shares: tuple[int, int, int]) -> None:
    if not sum(shares):
        return
    sources = split_sources(DataConfig(data_path=("a",), split=",".join(map(str, shares))))
    ranges = [source.documents(count) for source in sources if source is not None]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == count
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@given(st.integers(0, 10_000), st.tuples(st.integers(1, 999), st.integers(0, 99), st.integers(0, 9)))
def test_splits_are_megatrons(count: int, shares: tuple[int, int, int]) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    split = ",".join(map(str, shares))
    theirs = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for ours, bounds in zip(split_sources(DataConfig(data_path=("a",), split=split)), theirs, strict=True):
        assert (ours is None) == (bounds is None)
        if ours is not None and bounds is not None:
            assert (
                np.abs(np.subtract(ours.documents(count), [round(bound * count) for bound in bounds])).max()
                <= 1
            )


def test_a_path_for_each_split() -> None:
    data = DataConfig(train_data_path=("1", "a", "2", "b"), valid_data_path=("c",))
    assert split_sources(data) == [
        SplitSources(Blend(("a", "b"), (1, 2))),
        SplitSources(Blend(("c",), None)),
        None,
    ]


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (DataConfig(), [r"data\.data_path, data\.train_data_path and data\.mock are all unset"]),
        (DataConfig(valid_data_path=("a",)), [r"data\.train_data_path and data\.mock are all unset"]),
        (
            DataConfig(data_path=("a",), train_data_path=("b",)),
            [r"data\.data_path and data\.train_data_path are both given"],
        ),
        (DataConfig(data_path=("0", "a"), split="x"), ["weight of a is 0", r"data\.split='x'"]),
    ],
)
def test_contradictions(data: DataConfig, messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        split_sources(data)
    for line, message in zip(str(caught.value).split("\n"), messages, strict=True):
        assert re.search(message, line)


def test_a_dataset_given_twice_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.bin").symlink_to("a.bin")
    with pytest.raises(ConfigError, match="link is given twice"):
        parse_blend("data.data_path", [str(tmp_path / "a"), str(tmp_path / "link")])

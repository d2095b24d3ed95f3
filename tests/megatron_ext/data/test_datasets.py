import logging
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import DataConfig
from megatron_ext.data import datasets
from megatron_ext.data.batch import make_batch
from megatron_ext.data.datasets import Datasets, _say_limit, build_datasets
from megatron_ext.data.loader import build_data_iterator
from megatron_ext.data.open_file import OpenFiles, open_limit
from megatron_ext.data.samples import Origin, SampleDataset
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import numbered_documents, write_dataset
from tests.megatron_ext.data.descriptors import at_most, descriptors
from tests.ranks import run_on_ranks

SOURCE = 300
"""Tokens of source number n are between n * SOURCE and (n + 1) * SOURCE."""


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three datasets with 10 samples of 8 tokens in each epoch, and tokens of their own."""
    folder = tmp_path_factory.mktemp("datasets")
    contents = [[range(start + 1, start + 82)] for start in (0, SOURCE, 2 * SOURCE)]
    return [write_dataset(folder / f"d{number}", documents) for number, documents in enumerate(contents)]


def build(data: DataConfig, *samples: int | None, seed: int = 1, seq_length: int = 8) -> Datasets:
    wanted = (*samples, 0, 0, 0)[:3]
    return build_datasets(data, seq_length=seq_length, num_samples=wanted, seed=seed, vocab_size=1000, eod=0)


def texts_of(samples: SampleDataset | None) -> list[list[int]]:
    assert samples is not None
    return [samples[number]["labels"].tolist() for number in range(len(samples))]


def sources_of(samples: SampleDataset | None) -> Counter[int]:
    return Counter(text[0] // SOURCE for text in texts_of(samples))


def test_numbers_of_samples(prefixes: list[str]) -> None:
    one = DataConfig(data_path=(prefixes[0],), split="1,0,0")
    for number in (1, 9, 10, 11, 35):
        assert len(texts_of(build(one, number).train)) == number
    assert len(texts_of(build(one, None).train)) == 10
    assert build(one, 0) == Datasets(None, None, None)
    built = build(one, 1, 5, None)
    assert (built.valid, built.test) == (None, None)


@settings(max_examples=15)
@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=3), st.integers(1, 60))
def test_weights_are_shares_of_the_samples(prefixes: list[str], weights: list[float], samples: int) -> None:
    entries = [entry for pair in zip(map(str, weights), prefixes, strict=False) for entry in pair]
    train = build(DataConfig(data_path=tuple(entries), split="1,0,0"), samples).train
    counts = sources_of(train)
    assert sum(counts.values()) == samples
    for source, weight in enumerate(weights):
        assert abs(counts[source] - samples * weight / sum(weights)) < 2


def test_extreme_weights(prefixes: list[str]) -> None:
    train = build(DataConfig(data_path=("1e-6", prefixes[0], "1e6", prefixes[1]), split="1,0,0"), 500).train
    assert sources_of(train)[1] >= 499


def test_every_sample_of_a_source_comes_before_any_is_repeated(prefixes: list[str]) -> None:
    train = build(DataConfig(data_path=("1", prefixes[0], "3", prefixes[1]), split="1,0,0"), 40).train
    texts = texts_of(train)
    for source, counts in ((0, [1] * 10), (1, [3] * 10)):
        of_source = [tuple(text) for text in texts if text[0] // SOURCE == source]
        assert sorted(Counter(of_source).values()) == counts
        assert len(set(of_source[:10])) == 10


def test_without_weights_sources_count_by_their_size(prefixes: list[str], tmp_path: Path) -> None:
    large = write_dataset(tmp_path / "large", [range(SOURCE + 1, SOURCE + 242)])
    data = DataConfig(data_path=(prefixes[0], large), split="1,0,0")
    assert sources_of(build(data, 80).train) == {0: 20, 1: 60}
    all_samples = build(data, None).train
    assert sources_of(all_samples) == {0: 10, 1: 30}
    assert len({tuple(text) for text in texts_of(all_samples)}) == 40


def test_weights_without_a_number_repeat_nothing(prefixes: list[str]) -> None:
    train = build(DataConfig(data_path=("1", prefixes[0], "4", prefixes[1]), split="1,0,0"), None).train
    counts = sources_of(train)
    assert counts[1] == 10
    assert counts[0] in (2, 3)


def test_the_first_samples_do_not_depend_on_the_number(prefixes: list[str]) -> None:
    data = DataConfig(data_path=("2", prefixes[0], "1", prefixes[1], "5", prefixes[2]), split="1,0,0")
    longest = texts_of(build(data, 120).train)
    for number in (1, 10, 50, 119):
        assert texts_of(build(data, number).train) == longest[:number]
    assert texts_of(build(data, 120, seed=2).train) != longest


def test_splits_share_no_document(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [range(1 + 9 * n, 10 + 9 * n) for n in range(100)])
    built = build(DataConfig(data_path=(prefix,), split="80,15,5"), None, None, None)
    seen = [
        {token for text in texts_of(split) for token in text}
        for split in (built.train, built.valid, built.test)
    ]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert max(seen[0]) <= 720 < min(seen[1])
    assert max(seen[1]) <= 855 < min(seen[2])


def test_a_path_for_each_split(prefixes: list[str]) -> None:
    data = DataConfig(train_data_path=(prefixes[0], prefixes[1]), valid_data_path=(prefixes[2],))
    built = build(data, 20, 5, 5)
    assert sources_of(built.train) == {0: 10, 1: 10}
    assert sources_of(built.valid) == {2: 5}
    assert built.test is None


def test_indices_are_kept_beside_the_dataset_or_where_told(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "data" / "d", numbered_documents([40] * 3))
    build(DataConfig(data_path=(prefix,), split="1,0,0"), 5)
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "data" / "index_cache").iterdir()] == [
        "d-train"
    ]
    build(DataConfig(data_path=(prefix,), split="1,0,0", data_cache_path=str(tmp_path / "cache")), 5)
    assert [path.name.rsplit("-", 1)[0] for path in (tmp_path / "cache").iterdir()] == ["d-train"]


def test_a_split_with_too_few_tokens(prefixes: list[str], tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", numbered_documents([40] * 3))
    data = DataConfig(data_path=(prefix,), split="98,1,1")
    with pytest.raises(
        ConfigError,
        match=r"the valid split of .*d has 0 documents, its share by data\.split=98,1,1, with 0 tokens in "
        r"all, but one sample takes train\.seq_length \+ 1 = 9",
    ):
        build(data, 5, 5)
    assert build(data, 5, None).valid is None
    small = write_dataset(tmp_path / "small", [[1, 2, 3]])
    with pytest.raises(ConfigError, match=r"the train split of .*small has 1 documents with 3 tokens in all"):
        build(DataConfig(train_data_path=("1", prefixes[0], "1", small)), 5)
    assert sources_of(build(DataConfig(train_data_path=(prefixes[0], small)), 5).train) == {0: 5}


def test_whatever_is_wrong_with_the_data_is_said_at_once(prefixes: list[str], tmp_path: Path) -> None:
    data = DataConfig(data_path=(prefixes[0], str(tmp_path / "none"), str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match=r"none\.bin and .*none\.idx not found(.|\n)*nothing\.bin"):
        build(data, 5)
    assert not (tmp_path / "index_cache").exists()


def test_mock_documents() -> None:
    built = build(DataConfig(mock=True), 50, None, 0, seq_length=64)
    assert built.train is not None
    assert built.valid is not None
    assert built.test is None
    assert (len(built.train), len(built.valid)) == (50, 1000)
    item = built.train[3]
    assert item["tokens"].shape == item["labels"].shape == (64,)
    assert item["tokens"].dtype == torch.int64
    assert texts_of(built.train) == texts_of(build(DataConfig(mock=True), 50, seq_length=64).train)
    assert item["tokens"].tolist() != built.valid[3]["tokens"].tolist()
    with pytest.raises(IndexError):
        built.train[50]


@pytest.mark.parametrize("eod", [0, 7, 11, None])
def test_mock_documents_count_upwards_and_end(eod: int | None) -> None:
    built = build_datasets(
        DataConfig(mock=True), seq_length=512, num_samples=(20, 0, 0), seed=1, vocab_size=12, eod=eod
    )
    assert built.train is not None
    texts = np.array(texts_of(built.train))
    assert set(texts.flatten().tolist()) == set(range(12))
    ends = texts == eod
    following = np.array([[(token + 1) % 12 for token in text] for text in texts.tolist()])
    if eod is not None:
        following[following == eod] = (eod + 1) % 12
    counted = texts[:, 1:] == following[:, :-1]
    starts_anew = ends[:, :-1] | ends[:, 1:]
    assert counted.mean() > 0.95
    if eod is not None:
        assert (counted | starts_anew).all()
        assert 20 <= ends.sum() <= 20 * 12


def test_from_files_to_batches(tmp_path: Path) -> None:
    """Documents of ten tokens, the last of which ends them, read by worker processes."""
    prefixes = [
        write_dataset(tmp_path / f"d{n}", numbered_documents([10] * 40, first=1 + n * 360)) for n in range(2)
    ]
    data = DataConfig(
        data_path=tuple(prefixes), split="1,0,0", reset_position_ids=True, reset_attention_mask=True
    )
    train = build(data, 60, seq_length=25).train
    assert train is not None
    batches = [
        [
            make_batch(samples, data, 0, "cpu")
            for samples in islice(
                build_data_iterator(
                    train,
                    consumed_samples=0,
                    micro_batch_size=3,
                    data_parallel_rank=0,
                    data_parallel_size=1,
                    num_workers=workers,
                    seed=1,
                ),
                20,
            )
        ]
        for workers in (0, 2)
    ]
    for batch, again in zip(*batches, strict=True):
        assert batch.tokens.equal(again.tokens)
        assert batch.cu_seqlens is not None
        inside = batch.position_ids[:, 1:] > 0
        both = (batch.tokens[:, 1:] != 0) & (batch.tokens[:, :-1] != 0)
        assert (batch.tokens[:, 1:] == batch.tokens[:, :-1] + 1)[both].all()
        assert inside.equal(batch.tokens[:, :-1] != 0)
        assert (batch.cu_seqlens.diff() <= 10).all()


def build_on_rank(prefixes: list[str], cache: str, hidden: bool) -> Any:
    import torch.distributed as dist

    if hidden and dist.get_rank() == 1:
        datasets._SHARED_STORAGE_SECONDS = 0.6
        datasets.Path = HiddenPath  # type: ignore[misc, assignment]
    data = DataConfig(data_path=("1", prefixes[0], "2", prefixes[1]), split="1,0,0", data_cache_path=cache)
    try:
        return texts_of(build(data, 30).train)
    except ConfigError as error:
        return str(error)
    finally:
        datasets.Path = Path  # type: ignore[misc]


class HiddenPath(type(Path())):  # type: ignore[misc]
    """A path on a node that does not see the others' storage."""

    def is_dir(self) -> bool:
        return False


def test_all_ranks_get_the_same_samples(prefixes: list[str], tmp_path: Path) -> None:
    rank_0, rank_1 = run_on_ranks(2, build_on_rank, prefixes, str(tmp_path / "cache"), False)
    assert rank_0 == rank_1
    assert len(rank_0) == 30


def test_a_rank_that_does_not_see_the_index(prefixes: list[str], tmp_path: Path) -> None:
    rank_0, rank_1 = run_on_ranks(2, build_on_rank, prefixes, str(tmp_path / "cache"), True)
    assert len(rank_0) == 30
    assert rank_1.startswith("rank 1 on ")
    assert "does not see" in rank_1
    assert rank_1.endswith("must be on storage that all nodes share.")


def test_bad_data_is_an_error_on_every_rank(tmp_path: Path) -> None:
    rank_0, rank_1 = run_on_ranks(
        2, build_on_rank, [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path), False
    )
    assert rank_0 == rank_1
    assert "a.bin and" in rank_0


def test_samples_say_where_they_are_from(tmp_path: Path) -> None:
    """Every token of these datasets occurs once, so it tells its place."""
    lengths, places = [5, 30, 1, 12, 7] * 4, {}
    prefixes, token = [], 1
    for number in range(2):
        contents = []
        for length in lengths:
            contents.append([*range(token, token + length)])
            places |= {
                token + at: Origin(str(tmp_path / f"d{number}"), len(contents) - 1, at)
                for at in range(length)
            }
            token += length
        prefixes.append(write_dataset(tmp_path / f"d{number}", contents))
    blend = DataConfig(data_path=("1", prefixes[0], "3", prefixes[1]), split="1,0,0")
    one = DataConfig(data_path=(prefixes[1],), split="50,50,0")
    for samples in (build(blend, 90).train, build(one, 5, 5).valid):
        assert samples is not None
        for number in range(len(samples)):
            assert samples.origin(number) == places[samples[number]["tokens"][0].item()]
        with pytest.raises(IndexError):
            samples.origin(len(samples))
    assert str(Origin("d/x", 12, 40)) == "dataset d/x, document 12, token 40"
    mock = build(DataConfig(mock=True), 5).train
    assert mock is not None
    assert str(mock.origin(3)) == "dataset data.mock, document 3, token 0"
    with pytest.raises(IndexError):
        mock.origin(5)


def test_a_blend_of_more_datasets_than_files_that_may_be_open(tmp_path: Path) -> None:
    """Here 60 datasets, 300 files, where 40 may be open: as 5,000 under a usual limit."""
    count = 60
    prefixes = [
        write_dataset(tmp_path / f"d{number}", [[number + 1] * 20, [number + 1] * 14], vocab_size=100)
        for number in range(count)
    ]
    open_before, most, read = len(descriptors()), 0, []
    with at_most(40):
        samples = build(DataConfig(data_path=tuple(prefixes), split="1"), 3 * count, seq_length=16).train
        assert samples is not None
        for index in range(3 * count):
            read.append(samples[index]["labels"].tolist())
            most = max(most, len(descriptors()))
        allowed = open_limit() // 4
    assert open_before < most <= open_before + allowed
    assert pickle.loads(pickle.dumps(samples))[7]["labels"].tolist() == read[7]
    anew = texts_of(build(DataConfig(data_path=tuple(prefixes), split="1"), 3 * count, seq_length=16).train)
    assert anew == read
    assert {row[0] for row in read} == set(range(1, count + 1))


def test_how_many_files_are_open_is_said_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _say_limit(3, OpenFiles(15))
        assert caplog.messages == []
        _say_limit(4, OpenFiles(15))
    said = "a blend of 4 datasets: each process has at most 15 of their files open at a time, and may have "
    assert caplog.messages == [f"{said}{open_limit()} open in all (ulimit -n)"]

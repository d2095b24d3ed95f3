"""Conversations packed into samples."""

import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_ext.config import DataConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.loader import build_data_iterator
from megatron_ext.data.order import Continuation
from megatron_ext.data.packed_samples import PackedOrigin
from megatron_ext.data.samples import SampleDataset
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import random_chats, write_chats

SEQ_LENGTH = 24
CHATS = random_chats(60, vocab_size=900)


def build(
    data: DataConfig, *samples: int | None, seed: int = 1, resumed: Continuation | None = None, **options: Any
) -> Datasets:
    settings = {"seq_length": SEQ_LENGTH, "vocab_size": 1000, "eod": None, **options}
    wanted = (*samples, 0, 0, 0)[:3]
    return build_datasets(data, num_samples=wanted, seed=seed, resumed=resumed, **settings)


def chat_data(*prefixes: str, split: str = "1,0,0", **options: Any) -> DataConfig:
    return DataConfig(format="chat", data_path=prefixes, split=split, num_workers=0, **options)


def read_back(samples: SampleDataset) -> list[list[tuple[list[int], list[bool]]]]:
    """The conversations of each sample, cut at the places that say where one begins. All but the last token
    of each is read; the last one is known if it is learned."""
    rows = []
    for number in range(len(samples)):
        tokens, labels, begins = (samples[number][name].numpy() for name in ("tokens", "labels", "begins"))
        ends = [*np.flatnonzero(begins)[1:].tolist(), len(tokens)]
        row = []
        for first, end in zip(np.flatnonzero(begins).tolist(), ends, strict=True):
            if tokens[first] < 0:
                assert (tokens[first:] < 0).all() and (labels[first:] < 0).all()
                continue
            learned = labels[first:end] >= 0
            inner = learned[:-1]
            assert (labels[first : end - 1][inner] == tokens[first + 1 : end][inner]).all()
            row.append(([*tokens[first:end].tolist(), int(labels[end - 1])], [False, *learned.tolist()]))
        rows.append(row)
    return rows


def counted(chats: Any) -> Counter[str]:
    return Counter(map(str, chats))


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_chats(tmp_path / "chats", CHATS)


def train_of(data: DataConfig, *samples: int | None, **options: Any) -> SampleDataset:
    train = build(data, *samples, **options).train
    assert train is not None
    return train


def test_every_conversation_comes_once_in_each_epoch(prefix: str) -> None:
    epoch = train_of(chat_data(prefix), None)
    rows = read_back(epoch)
    assert counted(chat for row in rows for chat in row) == counted(CHATS)
    places = sum(len(tokens) - 1 for tokens, _ in CHATS)
    assert places > 0.95 * SEQ_LENGTH * len(epoch)
    three = read_back(train_of(chat_data(prefix), 3 * len(epoch)))
    assert three[: len(rows)] == rows
    assert three[len(rows) : 2 * len(rows)] != rows
    for number in (1, 2):
        part = three[number * len(rows) : (number + 1) * len(rows)]
        assert counted(chat for row in part for chat in row) == counted(CHATS)


def test_samples_follow_from_the_seed(prefix: str) -> None:
    one, same, other = (read_back(train_of(chat_data(prefix), 20, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_readers_in_other_processes(prefix: str) -> None:
    samples = train_of(chat_data(prefix), 20)
    assert read_back(pickle.loads(pickle.dumps(samples))) == read_back(samples)


def test_splits_and_blends(prefix: str, tmp_path: Path) -> None:
    other = write_chats(tmp_path / "other", random_chats(40, vocab_size=900, seed=2))
    parts = build(chat_data(prefix, split="50,50,0"), None, None)
    assert parts.train is not None and parts.valid is not None
    for part, chats in ((parts.train, CHATS[:30]), (parts.valid, CHATS[30:])):
        assert counted(chat for row in read_back(part) for chat in row) == counted(chats)
    blend = train_of(chat_data("1", prefix, "3", other), 80)
    sources = Counter(blend.origin(number).prefix for number in range(80))  # type: ignore[attr-defined]
    assert sources == {prefix: 20, other: 60}


def test_samples_say_what_they_hold(prefix: str) -> None:
    samples = train_of(chat_data(prefix), 12)
    for number, row in enumerate(read_back(samples)):
        origin = samples.origin(number)
        assert isinstance(origin, PackedOrigin)
        assert counted(CHATS[chat] for chat in origin.conversations) == counted(row)
    with pytest.raises(IndexError):
        samples.origin(12)
    assert str(PackedOrigin("d/x", (5,))) == "dataset d/x, conversation 5"
    assert str(PackedOrigin("d/x", (5, 17))) == "dataset d/x, conversations 5, 17"


def overlong_data(tmp_path: Path, rule: Literal["truncate", "drop", "error"]) -> DataConfig:
    """Three conversations, of 25, 40 and 60 tokens; the last one is learned behind token 30 only."""
    lengths = (SEQ_LENGTH + 1, 40, 60)
    chats = [([*range(1, n + 1)], [at >= (30 if n == 60 else 2) for at in range(n)]) for n in lengths]
    return chat_data(write_chats(tmp_path / "long", chats), chat_overlong=rule)


@pytest.mark.parametrize(
    ("rule", "lengths", "said"),
    [
        ("truncate", [25, 25], "(data.chat_overlong=truncate): the end of 1 is cut off, 1 are left out"),
        ("drop", [25], "(data.chat_overlong=drop): the end of 0 is cut off, 2 are left out"),
    ],
)
def test_conversations_that_are_too_long(
    rule: Any, lengths: list[int], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = overlong_data(tmp_path, rule)
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # made, and found
            samples = train_of(data, None)
            assert [len(chat[0]) for row in read_back(samples) for chat in row] == lengths
    line = f"2 of 3 conversations are longer than train.seq_length + 1 = 25 tokens {said}"
    assert caplog.text.count(line) == 2
    assert f"{len(lengths)} conversations in {len(samples)} rows of train.seq_length=24" in caplog.text


def test_conversations_that_are_too_long_may_be_an_error(tmp_path: Path) -> None:
    data = overlong_data(tmp_path, "error")
    with pytest.raises(
        ConfigError,
        match=r"long \(train\): 2 of 3 conversations are longer than train\.seq_length \+ 1 = 25 tokens, the "
        r"longest has 60\. Raise train\.seq_length, or set data\.chat_overlong",
    ):
        build(data, 5)


def test_a_split_without_a_sample(tmp_path: Path) -> None:
    data = chat_data(write_chats(tmp_path / "long", [([1] * 60, [False] * 59 + [True])]))
    with pytest.raises(
        ConfigError,
        match=r"the train split of .*long has 1 conversations, its share by data\.split=1,0,0, with "
        r"something to learn in none of them within train\.seq_length \+ 1 = 25 tokens \(data\.chat_overlong",
    ):
        build(data, 5)


def test_a_run_goes_on_where_it_stood(prefix: str, tmp_path: Path) -> None:
    """Also in a blend, whose other part is new."""
    before = build(chat_data(prefix), 40)
    assert before.train is not None
    resumed = Continuation(10, before.order, False)
    other = write_chats(tmp_path / "other", random_chats(40, seed=2))
    blend = train_of(chat_data("1", prefix, "1", other), 30, resumed=resumed)
    origins = [blend.origin(number) for number in range(10, 30)]
    ours = [origin for origin in origins if origin.prefix == prefix]  # type: ignore[attr-defined]
    assert ours == [before.train.origin(number) for number in range(10, 20)]


def test_changed_data_are_refused(prefix: str, tmp_path: Path) -> None:
    before = build(chat_data(prefix), 40).order
    resumed = Continuation(5, before, False)
    write_chats(tmp_path / "chats", random_chats(60, vocab_size=900, seed=3))
    with pytest.raises(
        ConfigError, match=r"its documents are others than before \(its files, data\.split or"
    ):
        build(chat_data(prefix), 40, resumed=resumed)
    write_chats(tmp_path / "chats", CHATS)
    with pytest.raises(ConfigError, match=r"train\.seq_length was 24 and is 48"):
        build(chat_data(prefix), 40, resumed=resumed, seq_length=48)
    shorter = build(chat_data(prefix), 40, seq_length=12).order
    with pytest.raises(ConfigError, match=r"data\.chat_overlong changed"):
        build(
            chat_data(prefix, chat_overlong="drop"),
            40,
            resumed=Continuation(5, shorter, False),
            seq_length=12,
        )
    assert build(chat_data(prefix, chat_overlong="drop"), 40, resumed=resumed).train is not None


def test_tokens_that_the_model_does_not_have(prefix: str) -> None:
    samples = train_of(chat_data(prefix), 40)
    samples._vocab_size = 100  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"chats\.bin holds the token \d+, but the vocabulary has 100"):
        read_back(samples)


def test_an_index_that_was_damaged(prefix: str, tmp_path: Path) -> None:
    samples = train_of(chat_data(prefix), 40)
    path = Path(samples._directory) / "rows.npy"  # type: ignore[attr-defined]
    bounds, content = np.load(path), path.read_bytes()
    number = samples._order(0).tolist().index(0)  # type: ignore[attr-defined]
    for end, said in ((0, "row 0 goes from 0 to 0"), (30, f"sample {number} has more than 24 tokens")):
        changed = np.array([0, end, *bounds[2:]])
        path.write_bytes(content[: -bounds.nbytes] + changed.tobytes())
        with pytest.raises(ConfigError, match=said):
            train_like(samples)[number]
    with pytest.raises(ConfigError, match=r"rows\.npy: its content is not what was written"):
        build(chat_data(prefix), 40)


def train_like(samples: SampleDataset) -> SampleDataset:
    """The same samples, with the files opened again."""
    return pickle.loads(pickle.dumps(samples))


def test_batches(prefix: str) -> None:
    """Conversations see themselves only, their positions begin at 0, and padding is not counted."""
    samples = train_of(chat_data(prefix), None)
    iterator = build_data_iterator(
        samples,
        consumed_samples=0,
        micro_batch_size=len(samples),
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=0,
        seed=1,
    )
    batch = make_batch(next(iterator), chat_data(prefix), None, "cpu")
    assert batch.cu_seqlens is not None and batch.counted is not None
    row_lengths = [[len(tokens) - 1 for tokens, _ in row] for row in read_back(samples)]
    lengths = [
        length
        for row in row_lengths
        for length in (*row, *([SEQ_LENGTH - sum(row)] if sum(row) < SEQ_LENGTH else []))
    ]
    assert batch.cu_seqlens.diff().tolist() == lengths
    assert batch.position_ids.flatten().tolist() == [at for length in lengths for at in range(length)]
    assert int(batch.loss_mask.sum()) == sum(sum(learned) for _, learned in CHATS)
    assert batch.counted.sum(1).tolist() == [sum(row) for row in row_lengths]
    assert not batch.loss_mask[~batch.counted].any()

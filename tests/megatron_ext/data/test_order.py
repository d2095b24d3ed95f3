import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import DataConfig
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.order import Continuation, Source, TrainingOrder, continue_order
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import numbered_documents, write_dataset

SAMPLES_PER_EPOCH = (10, 5, 23)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Datasets with so many samples of 8 tokens in an epoch; every token occurs once, in one of them."""
    folder = tmp_path_factory.mktemp("datasets")
    starts = np.cumsum([1, *(8 * size + 1 for size in SAMPLES_PER_EPOCH)]).tolist()
    contents = [
        [range(start, start + 8 * n + 1)] for start, n in zip(starts, SAMPLES_PER_EPOCH, strict=False)
    ]
    return [write_dataset(folder / f"d{number}", documents) for number, documents in enumerate(contents)]


def blend_of(prefixes: Sequence[str], weights: Sequence[float]) -> DataConfig:
    pairs = zip(map(str, weights), prefixes, strict=True)
    entries = tuple(entry for weight, prefix in pairs if float(weight) for entry in (weight, prefix))
    return DataConfig(data_path=entries if len(entries) > 2 else entries[1:], split="1,0,0")


def build(
    data: DataConfig,
    samples: int,
    after: Datasets | None = None,
    consumed: int = 0,
    *,
    seed: int = 1,
    seq_length: int = 8,
    allowed: bool = False,
) -> Datasets:
    """The datasets of a run, or of one that goes on from that of `after`."""
    resumed = None
    if after is not None:
        assert after.order is not None
        stored = json.loads(json.dumps(after.order.to_dict()))  # as a checkpoint keeps it
        resumed = Continuation(consumed, TrainingOrder.from_dict(stored), allowed)
    return build_datasets(
        data,
        seq_length=seq_length,
        num_samples=(samples, 0, 0),
        seed=seed,
        vocab_size=1000,
        eod=0,
        resumed=resumed,
    )


def read(datasets: Datasets, start: int, stop: int) -> list[tuple[str, tuple[int, ...]]]:
    """Dataset and tokens of the samples of a run."""
    samples = datasets.train
    assert samples is not None
    assert len(samples) >= stop
    return [
        (samples.origin(number).prefix, tuple(samples[number]["tokens"].tolist()))
        for number in range(start, stop)
    ]


weights_of = st.lists(st.sampled_from([0, 0.5, 1, 2, 7.5]), min_size=3, max_size=3).filter(any)


@settings(max_examples=8)
@given(st.lists(st.tuples(weights_of, st.integers(1, 25), st.integers(0, 30)), min_size=2, max_size=4))
def test_weights_and_sources_may_change_and_every_source_goes_on(
    prefixes: list[str], phases: list[tuple[list[float], int, int]]
) -> None:
    """However often: each source gives its samples in the order in which it gives them alone."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    before = None
    for weights, samples, unread in phases:
        # A phase may be meant to be longer than it gets.
        wanted = len(seen) + samples + unread
        data = blend_of(prefixes, weights)
        before = build(data, wanted, before, len(seen), allowed=True)  # none may be left of the sources
        seen += read(before, len(seen), len(seen) + samples)
    for prefix in prefixes:
        of_source = [text for name, text in seen if name == prefix]
        alone = build(DataConfig(data_path=(prefix,), split="1,0,0"), max(1, len(of_source)))
        assert of_source == [text for _, text in read(alone, 0, len(of_source))]


def test_a_source_that_was_left_out_comes_back(prefixes: list[str]) -> None:
    """Under another seed, which is lost within its epoch, and under its own."""
    both, one = blend_of(prefixes, (1, 1, 0)), blend_of(prefixes, (0, 1, 0))
    first = build(both, 12)
    second = build(one, 16, first, 12)
    third = build(both, 24, second, 16)
    assert third.order is not None
    assert [source.before for source in third.order.sources] == [6, 10]
    at_an_end = build(one, 30, second, 16, seed=2)  # the fourth epoch of the second dataset begins
    with pytest.raises(ConfigError, match=r"d0: train\.seed was 1 and is 2, and .* after 6 of 10 samples"):
        build(both, 40, at_an_end, 21, seed=2)
    back = build(both, 40, at_an_end, 16, seed=1)
    assert back.order is not None
    assert [source.before for source in back.order.sources] == [6, 10]


def test_shares_after_a_change_are_the_new_ones(prefixes: list[str]) -> None:
    first = build(blend_of(prefixes, (1, 1, 0)), 20)
    second = build(blend_of(prefixes, (9, 1, 0)), 120, first, 20)
    names = [name for name, _ in read(second, 20, 120)]
    assert abs(names.count(prefixes[0]) - 90) <= 1


@settings(max_examples=6)
@given(weights_of, st.integers(1, 40), st.integers(0, 40), st.booleans())
def test_nothing_changes_for_a_run_that_is_made_longer_or_shorter(
    prefixes: list[str], weights: list[float], consumed: int, more: int, twice: bool
) -> None:
    data = blend_of(prefixes, weights)
    whole = read(build(data, consumed + more), 0, consumed + more)
    first = build(data, consumed + 3)
    assert read(first, 0, consumed) == whole[:consumed]
    second = build(data, consumed + more, first, consumed)
    assert second.order == first.order
    if twice:
        second = build(data, consumed + more, second, consumed)
    assert read(second, 0, consumed + more) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "train.seed was 1 and is 2"),
        ({"seq_length": 4}, "train.seq_length was 8 and is 4"),
        ({"seed": 2, "seq_length": 4}, "train.seed was 1 and is 2 and train.seq_length was 8 and is 4"),
    ],
)
def test_another_order_is_refused_within_an_epoch(
    prefixes: list[str], changes: dict[str, int], message: str
) -> None:
    data = DataConfig(data_path=(prefixes[0],), split="1,0,0")
    first = build(data, 30)
    with pytest.raises(ConfigError) as refusal:
        build(data, 40, first, 17, **changes)
    expected = (
        f"{prefixes[0]}: {message}, and the run is within epoch 2, after 7 of 10 samples, whose order is "
        "lost: up to 24 tokens would be read twice in this epoch, and as many not at all."
    )
    assert expected in str(refusal.value)
    assert "set data.allow_changed_data to go on" in str(refusal.value)
    allowed = build(data, 60, first, 17, **changes, allowed=True)
    order, per_epoch = allowed.order, 80 // changes.get("seq_length", 8)
    assert order is not None
    assert order.sources[0].before == per_epoch * 17 // 10
    assert order.first_sample == 17
    # The rest of the second epoch, then a whole one without repetition.
    rest = per_epoch * 3 // 10
    texts = [text for _, text in read(allowed, 17 + rest, 17 + rest + per_epoch)]
    assert len({*texts}) == per_epoch


def test_another_order_may_begin_with_an_epoch(prefixes: list[str]) -> None:
    data = blend_of(prefixes, (2, 1, 0))
    first = build(data, 45)
    for consumed in (0, 15, 30):
        second = build(data, 90, first, consumed, seed=2, seq_length=4)
        texts = [text for name, text in read(second, consumed, consumed + 30) if name == prefixes[0]]
        assert len({*texts}) == 20
    with pytest.raises(ConfigError, match=r"within epoch 1, after \d of 10 samples(.|\n)*after \d of 5"):
        build(data, 90, first, 13, seed=2)


def test_other_documents_under_the_same_path(tmp_path: Path) -> None:
    lengths = [20] * 30
    data = DataConfig(
        data_path=(write_dataset(tmp_path / "d", numbered_documents(lengths)),), split="80,10,10"
    )
    first = build(data, 30)
    message = r"its documents are others than before \(its files, data\.split or data\.chat_overlong"
    with pytest.raises(ConfigError, match=message):
        build(replace(data, split="90,10,0"), 60, first, 20)
    same = build(replace(data, split="80,20,0"), 60, first, 20)  # the training documents are the same
    assert same.order == first.order
    for documents in (numbered_documents(lengths, first=2), numbered_documents([19, 21, *lengths[2:]])):
        write_dataset(tmp_path / "d", documents)
        with pytest.raises(ConfigError, match=r"d: its documents are others than before"):
            build(data, 60, first, 20)
        assert build(data, 60, first, 20, allowed=True).train is not None


def test_datasets_that_were_moved_go_on(
    tmp_path: Path, prefixes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = build(blend_of(prefixes, (1, 2, 0)), 40)
    moved = [str(tmp_path / name) for name in ("x", "y")]
    for old, new in zip(prefixes, moved, strict=False):
        for ending in (".bin", ".idx", ".dataset.json"):
            Path(f"{new}{ending}").write_bytes(Path(f"{old}{ending}").read_bytes())
    second = build(blend_of(moved, (1, 2)), 40, first, 13)
    assert [text for _, text in read(second, 13, 40)] == [text for _, text in read(first, 13, 40)]
    assert f"{moved[0]} has the documents of {prefixes[0]} and goes on where that stood" in caplog.text


def test_what_changes_is_said(prefixes: list[str], caplog: pytest.LogCaptureFixture) -> None:
    first = build(blend_of(prefixes, (1, 1, 0)), 20)
    build(blend_of(prefixes, (0, 1, 1)), 40, first, 20)
    for sentence in (
        f"training data: {prefixes[1]} goes on after 10 samples.",
        f"training data: {prefixes[2]} is new and begins with its first sample.",
        f"training data: {prefixes[0]} is left out after 10 samples.",
    ):
        assert sentence in caplog.messages


def test_none_of_the_data_goes_on(prefixes: list[str]) -> None:
    first = build(DataConfig(data_path=(prefixes[0],), split="1,0,0"), 20)
    for other in (DataConfig(data_path=(prefixes[1],), split="1,0,0"), DataConfig(mock=True)):
        with pytest.raises(
            ConfigError, match=r"none of the checkpoint's training data, .*d0, is among that of"
        ):
            build(other, 30, first, 20)
        samples = read(build(other, 30, first, 20, allowed=True), 20, 30)
        assert samples == [(name, text) for name, text in read(build(other, 10), 0, 10)]


def test_thousands_of_datasets_go_on_at_once() -> None:
    names = [f"d{number}" for number in range(4000)]
    sources = tuple(Source(name, name, 1, 8, 10, 1.0) for name in names)
    present = TrainingOrder(0, tuple(replace(source, weight=2.0) for source in sources[::-1][1:]))
    begin = time.monotonic()
    order, _ = continue_order(present, Continuation(6000, TrainingOrder(0, sources), False))
    assert time.monotonic() - begin < 20
    assert {source.before for source in order.sources} == {1, 2}
    assert sum(source.before for source in (*order.sources, *order.left_out)) == 6000


def test_mock_data_change_their_seed(prefixes: list[str]) -> None:
    data = DataConfig(mock=True)
    first = build(data, 20)
    assert read(build(data, 30, first, 20), 0, 20) == read(first, 0, 20)
    with pytest.raises(ConfigError, match=r"data\.mock: train\.seed was 1 and is 2"):
        build(data, 30, first, 20, seed=2)
    assert build(data, 30, first, 20, seed=2, allowed=True).train is not None


@pytest.mark.parametrize(
    "change",
    [
        {"sources": []},
        {"sources": None},
        {"sources": [{"prefix": "a"}]},
        {"left_out": [{"prefix": "a"}]},
        {"first_sample": -1},
        {"first_sample": "1"},
    ],
)
def test_an_order_that_cannot_be(change: dict[str, Any]) -> None:
    order = TrainingOrder(0, (Source("a", "", 1, 8, 10, 1.0),))
    assert TrainingOrder.from_dict(order.to_dict()) == order
    with pytest.raises(ConfigError, match="order of the training data cannot be read"):
        TrainingOrder.from_dict({**order.to_dict(), **change})
    for wrong in ({"weight": 0.0}, {"per_epoch": 0}, {"before": -1}, {"prefix": 3}, {"seed": 1.5}, {"x": 1}):
        source = {**order.to_dict()["sources"][0], **wrong}
        with pytest.raises(ConfigError, match="order of the training data cannot be read"):
            TrainingOrder.from_dict({**order.to_dict(), "sources": [source]})

"""Runs that go on with other settings: what is read, what is said, what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.training.continuation import continuation_of
from tests.megatron_ext.data.builders import write_dataset
from tests.megatron_ext.training.runs import logged_to, reports, tiny_run, train
from tests.ranks import run_on_ranks


def train_and_log(run: RunConfig) -> str:
    """On a rank: what it logs while it trains."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("megatron_ext")
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    train(run)
    return "\n".join(lines)


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    """Of 33 and 66 samples of 24 tokens."""
    return [
        write_dataset(tmp_path / f"d{n}", [[5 + n] * length for length in lengths], vocab_size=97)
        for n, lengths in enumerate(([81] * 10, [80] * 20))
    ]


def run_on(
    data: dict[str, Any], folder: Path, *, train: dict[str, Any] | None = None, load: bool = True
) -> RunConfig:
    paths = {"save": str(folder), **({"load": str(folder)} if load else {})}
    return tiny_run(
        data={"mock": False, "split": "1,0,0", **data},
        train=train or {},
        checkpoint={**paths, "save_interval": 3},
    )


def test_a_doubled_batch_goes_on_in_the_data(tmp_path: Path, prefixes: list[str]) -> None:
    """The three iterations that are left take 24 samples, behind the 24 of the first six."""
    data, folder = {"data_path": [prefixes[0]]}, tmp_path / "run"
    first = run_on_ranks(1, train_and_log, run_on(data, folder, load=False))[0]
    assert "train data            576 tokens, 0.73 epochs of " in first
    doubled = {"global_batch_size": 8, "train_iters": 9}
    run = logged_to(run_on(data, folder, train=doubled), tmp_path / "log.jsonl")
    log = run_on_ranks(1, train_and_log, run)[0]
    assert "train.global_batch_size was 4 and is 8" in log
    assert "train.train_iters was 6 and is 9" in log
    assert "the 3 from here on read 576 tokens, after 576 so far" in log
    assert "train data            1,152 tokens, 1.45 epochs of " in log
    consumed = [report["consumed_samples"] for report in reports(tmp_path / "log.jsonl")]
    assert consumed == [32, 40, 48]


def test_fewer_iterations_than_samples_were_read_for(tmp_path: Path, prefixes: list[str]) -> None:
    """A batch four times as large, and train_iters below what was done: there are training data all the
    same."""
    data, folder = {"data_path": [prefixes[0]]}, tmp_path / "run"
    run_on_ranks(1, train, run_on(data, folder, load=False))
    fewer = {"global_batch_size": 16, "train_iters": 3}
    assert run_on_ranks(1, train, run_on(data, folder, train=fewer)) == [6]


def test_another_length_or_seed_is_refused_or_allowed(tmp_path: Path, prefixes: list[str]) -> None:
    data, folder = {"data_path": ["1", prefixes[0], "1", prefixes[1]]}, tmp_path / "run"
    run_on_ranks(1, train, run_on(data, folder, load=False))
    longer = {"seq_length": 48, "train_iters": 8, "seed": 5}
    with pytest.raises(
        ConfigError,
        match=r"d0: train\.seed was 1234 and is 5 and train\.seq_length was 24 and is 48, .*after 12 of 33 "
        r"samples(.|\n)*d1: (.|\n)*data\.allow_changed_data",
    ):
        run_on_ranks(2, train, run_on(data, folder, train=longer))
    allowed = run_on({**data, "allow_changed_data": True}, folder, train=longer)
    assert "(data.allow_changed_data is set)" in run_on_ranks(1, train_and_log, allowed)[0]


def test_weights_change(tmp_path: Path, prefixes: list[str]) -> None:
    folder = tmp_path / "run"
    blend = ["1", prefixes[0], "1", prefixes[1]]
    run_on_ranks(1, train, run_on({"data_path": blend}, folder, load=False))
    other = run_on({"data_path": ["3", *blend[1:]]}, folder, train={"train_iters": 8})
    log = run_on_ranks(1, train_and_log, other)[0]
    assert f"{prefixes[0]} goes on after 12 samples." in log
    assert "train data            768 tokens of 2 datasets\n" in log
    assert f" 56.2%, 0.55 epochs of {prefixes[0]}" in log  # 12 + 3/4 of 8 of 33 samples
    progress = json.loads((folder / "iter_0000008" / "progress.json").read_text())
    assert [source["before"] for source in progress["training_order"]["sources"]] == [12, 12]


def test_a_split_that_nothing_reads_may_be_empty(tmp_path: Path, prefixes: list[str]) -> None:
    """Of 10 documents the test split gets none, and validation one, too few for a sample."""
    weighted = {"data_path": ["1", prefixes[0], "1", prefixes[1]]}
    run = run_on({**weighted, "split": "969,30,1"}, tmp_path / "run", load=False)
    assert run_on_ranks(1, train, run) == [6]
    evaluated = {"eval_interval": 3, "eval_iters": 1}
    run = run_on({**weighted, "split": "800,200,1"}, tmp_path / "other", train=evaluated, load=False)
    log = run_on_ranks(1, train_and_log, run)[0]
    assert "valid data            96 tokens of 2 datasets" in log
    run = run_on({**weighted, "split": "999,1"}, tmp_path / "third", train=evaluated, load=False)
    with pytest.raises(ConfigError, match=r"the valid split of .*d0 has 0 documents"):
        run_on_ranks(1, train, run)


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    assert run_on_ranks(1, of_an_earlier_version) == [True]


def of_an_earlier_version() -> bool:
    from megatron_ext.command_line import config_to_dict

    run = tiny_run()
    progress = {"iteration": 3, "consumed_samples": 12, "consumed_tokens": 288}
    assert continuation_of(run, config_to_dict(run), progress).order is None
    other = tiny_run(train={"seed": 7}, data={"mock": False, "data_path": ["a"]})
    with pytest.raises(
        ConfigError, match=r"data\.data_path was \[\] and is \['a'\].*train\.seed was 1234 and is 7.*earlier"
    ):
        continuation_of(other, config_to_dict(run), progress)
    allowed = tiny_run(train={"seed": 7}, data={"allow_changed_data": True})
    assert continuation_of(allowed, config_to_dict(run), progress).order is None
    return True

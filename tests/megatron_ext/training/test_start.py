"""What a run starts from, and what keeps it from saving: settled before the model is built."""

import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lckv.policies.dms.config import DMSConfig
from megatron_ext import atomic
from megatron_ext.checkpointing.errors import (
    MismatchError,
    NoCheckpointError,
)
from megatron_ext.checkpointing.lock import FolderLock
from megatron_ext.checkpointing.manifest import Layout, Manifest, read_manifest, write_manifest
from megatron_ext.config import CheckpointConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.training import iteration, loop
from megatron_ext.training.start import Start, choose_start
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks

YOCO = {"layer_types": "0s_1s_2_2", "sliding_window": 8}
LCKV = {"layer_types": "0_2_2_3", "forward_passes": 2, "backward_passes": 2}


def checkpoint(path: Path) -> str:
    """A folder that has the name and the manifest of a checkpoint; returns its path."""
    path.mkdir(parents=True)
    write_manifest(path, Manifest(1, 1, Layout("cpu", 1, 1, 1, 1, 1), {}))
    return str(path)


def start_of(**settings: Any) -> Start:
    return choose_start(CheckpointConfig(**settings))


def test_the_same_settings_start_and_go_on(tmp_path: Path) -> None:
    plain, save = str(tmp_path / "plain"), str(tmp_path / "save")
    checkpoint(tmp_path / "plain" / "iter_0000005")
    first = {"load": plain, "finetune": True, "save": save}
    assert start_of(**first) == Start(plain, finetune=True, goes_on=False)
    assert start_of(save=save) == Start(None, finetune=False, goes_on=False)
    checkpoint(tmp_path / "save" / "iter_0000001")
    assert start_of(**first) == Start(save, finetune=False, goes_on=True)
    assert start_of(**first, resume="must") == Start(save, finetune=False, goes_on=True)
    assert start_of(save=save) == Start(save, finetune=False, goes_on=True)


def test_a_checkpoint_in_the_folder_that_is_asked_for_by_name_is_taken(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "save" / "iter_0000001")
    save = str(tmp_path / "save")
    for load in (one, save, f"{save}/"):
        for resume in ("auto", "never", "must"):
            found = start_of(save=save, load=load, finetune=True, resume=resume)
            assert found == Start(load, finetune=True, goes_on=False)


def test_without_a_folder_to_save_into_only_load_counts(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "iter_0000001")
    assert start_of(load=one) == Start(one, finetune=False, goes_on=False)
    assert start_of() == Start(None, finetune=False, goes_on=False)


def test_never_refuses_what_is_there(tmp_path: Path) -> None:
    save = str(tmp_path)
    assert start_of(save=save, resume="never").load is None
    checkpoint(tmp_path / "iter_0000003")
    message = (
        r"holds checkpoints of another run \(iter_0000003 and 0 more\) and checkpoint\.resume is never.*auto"
    )
    with pytest.raises(ConfigError, match=message):
        start_of(save=save, resume="never")


@pytest.mark.parametrize("load", [None, "plain"])
def test_must_refuses_where_nothing_is(tmp_path: Path, load: str | None) -> None:
    checkpoint(tmp_path / "plain" / "iter_0000005")
    settings = {"save": str(tmp_path / "save"), "load": load and str(tmp_path / load), "resume": "must"}
    message = r"checkpoint\.resume is must and checkpoint\.save .*save holds no checkpoint.*to auto to start"
    with pytest.raises(NoCheckpointError, match=message):
        start_of(**settings)


def test_a_damaged_checkpoint_is_no_reason_to_start_anew(tmp_path: Path) -> None:
    (tmp_path / "iter_0000003").mkdir()
    assert start_of(save=str(tmp_path)) == Start(str(tmp_path), finetune=False, goes_on=True)


def test_nothing_to_load_is_said_before_the_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match=r"checkpoint\.load: .*absent is not a directory that exists"):
        start_of(load=str(tmp_path / "absent"))


def hashes(checkpoint: Path) -> dict[str, str]:
    """What the files hold, but for the settings and the table of contents."""
    files = read_manifest(checkpoint).files
    return {name: files[name].sha256 for name in files if name not in ("config.json", ".metadata")}


def test_one_command_starts_and_continues_bit_for_bit(tmp_path: Path) -> None:
    """From the weights of another run, in two pieces, equal to one piece: random states and optimizer too."""
    run_on_ranks(1, train, tiny_run(compression=YOCO, checkpoint={"save": str(tmp_path / "plain")}))

    def run(name: str, **checkpoint: Any) -> RunConfig:
        settings = {"load": str(tmp_path / "plain"), "finetune": True, "save": str(tmp_path / name)}
        made = tiny_run(
            compression=YOCO, model={"hidden_dropout": 0.1}, checkpoint={**settings, **checkpoint}
        )
        return logged_to(made, tmp_path / f"{name}.jsonl")

    assert run_on_ranks(2, train, run("whole")) == [6, 6]
    assert run_on_ranks(2, train, run("pieces", save_interval=3)) == [6, 6]
    (tmp_path / "pieces" / "latest").unlink()  # what a crash before the second save would have left
    (tmp_path / "pieces" / "iter_0000006").rename(tmp_path / "gone")
    assert run_on_ranks(2, train, run("pieces", save_interval=3)) == [6, 6]
    assert hashes(tmp_path / "pieces" / "iter_0000006") == hashes(tmp_path / "whole" / "iter_0000006")
    assert series(tmp_path / "pieces.jsonl", "lm_loss") == series(tmp_path / "whole.jsonl", "lm_loss")
    assert [report["iteration"] for report in reports(tmp_path / "pieces.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_a_crash_has_left_goes_also_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    run = tiny_run(checkpoint={"save": str(tmp_path)}, train={"train_iters": 3})
    run_on_ranks(1, train, run)
    (tmp_path / ".iter_0000001.node7-12-345.trash").mkdir()
    assert run_on_ranks(1, train, run) == [3]
    assert sorted(os.listdir(tmp_path)) == ["iter_0000003", "latest", "run.yaml"]


def test_another_model_in_the_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    saving = {"checkpoint": {"save": str(tmp_path)}, "train": {"train_iters": 3}}
    run_on_ranks(1, train, tiny_run(compression=YOCO, **saving))
    before = (tmp_path / "run.yaml").read_bytes()
    with pytest.raises(
        MismatchError, match=r"layer_types(.|\n)*so this run goes on from them\. For a new run"
    ):
        run_on_ranks(1, train, tiny_run(compression=LCKV, **saving))
    assert (tmp_path / "run.yaml").read_bytes() == before
    assert not (tmp_path / "lock.json").exists(), "an error gives the folder back"


def error_of(run: RunConfig) -> tuple[str, str]:
    """On every rank: what training raises."""
    try:
        train(run)
    except ConfigError as error:
        return type(error).__name__, str(error)
    return "", ""


def errors(run: RunConfig) -> tuple[str, str]:
    first, second = run_on_ranks(2, error_of, run)
    assert first == second
    return first


def test_a_folder_in_use_is_refused_on_all_ranks_once(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.take()
    name, message = errors(tiny_run(checkpoint={"save": str(tmp_path)}))
    lock.release()
    assert name == "FolderInUseError"
    assert f"in use by process {os.getpid()}" in message


@pytest.mark.parametrize("save", ["file", "file/below", "dangling"])
def test_a_folder_that_cannot_be_is_refused_on_all_ranks_once(tmp_path: Path, save: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    name, message = errors(tiny_run(checkpoint={"save": str(tmp_path / save)}))
    assert name == "UnwritableFolderError"
    assert message.startswith(f"checkpoint.save: {tmp_path / save} cannot be written: ")


def test_one_checkpoint_is_no_folder_to_save_into(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "iter_0000003")
    name, message = errors(tiny_run(checkpoint={"save": one}))
    assert name == "UnwritableFolderError"
    assert message.endswith(f"is one checkpoint; give the directory in which checkpoints are: {tmp_path}")
    assert sorted(os.listdir(one)) == ["manifest.json"]


def test_settings_that_cannot_be_written_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").mkdir()
    name, message = errors(tiny_run(checkpoint={"save": str(tmp_path)}))
    assert name == "UnwritableFolderError"
    assert message.startswith(f"checkpoint.save: {tmp_path / 'run.yaml'} cannot be written: Is a directory")


def _on_full_disk(run: RunConfig) -> tuple[str, str]:
    def open_or_full(path: Path, mode: str) -> Any:
        return open("/dev/full" if Path(path).name == ".run.yaml.tmp" else path, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "open", open_or_full, raising=False)
        return error_of(run)


def test_a_full_disk_when_the_settings_are_written_is_one_error(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _on_full_disk, tiny_run(checkpoint={"save": str(tmp_path)}))
    assert first == second
    name, message = first
    assert name == "DiskFullError"
    assert message.startswith(f"checkpoint.save: {tmp_path / 'run.yaml'} cannot be written: No space left")
    assert "Free some space" in message
    assert os.listdir(tmp_path) == []


def _timeouts(run: RunConfig) -> list[float]:
    given: list[float] = []

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def note(*args: Any, **options: Any) -> Any:
            given.append(options["timeout_minutes"])
            return original(*args, **options)

        patch.setattr(module, name, note)

    with pytest.MonkeyPatch.context() as patch:
        spy(iteration, "saves")
        spy(loop, "load_checkpoint")
        train(run)
    return given


def test_the_time_outs_of_settings_are_those_of_saves_and_loads(tmp_path: Path) -> None:
    settings = {"save": str(tmp_path), "save_timeout_minutes": 3.5, "load_timeout_minutes": 2.5}
    run = tiny_run(checkpoint=settings, train={"train_iters": 3})
    assert run_on_ranks(1, _timeouts, run) == [[3.5]]
    longer = tiny_run(checkpoint=settings, train={"train_iters": 4})
    assert run_on_ranks(1, _timeouts, longer) == [[2.5, 3.5]]


def _without_space(run: RunConfig, free_bytes: int) -> tuple[str, str]:
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, free_bytes))
        return error_of(run)


@pytest.mark.parametrize(("precision", "trainable"), [("fp32", "all"), ("bf16", "all"), ("bf16", "policy")])
def test_space_for_the_first_checkpoint_is_looked_for_before_training(
    tmp_path: Path, precision: str, trainable: str
) -> None:
    saving = {"checkpoint": {"save": str(tmp_path)}, "model": {"hidden_size": 256}}
    run = tiny_run(**saving, train={"train_iters": 3, "precision": precision, "trainable": trainable})
    if trainable == "policy":
        adapter = DMSConfig(stage="retrofit", decision_source="adapter", window=3)
        run = replace(run, compression=replace(run.compression, policy=adapter))
    small = logged_to(run, tmp_path / "small.jsonl")
    name, message = run_on_ranks(1, _without_space, small, 100_000)[0]
    assert name == "DiskFullError"
    assert "no space for the first checkpoint" in message and "0.1 MB are free" in message
    assert reports(tmp_path / "small.jsonl") == [], "no step was done"
    assert run_on_ranks(1, train, run) == [3]
    size = read_manifest(tmp_path / "iter_0000003").bytes
    told = float(message.partition("it takes about ")[2].partition(" MB")[0]) * 1e6
    assert 0.6 * size < told <= size, "never more than it will be"

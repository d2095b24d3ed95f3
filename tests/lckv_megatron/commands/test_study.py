"""A study from its file to its picture."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lckv_megatron.commands.study import main
from lckv_megatron.study.carrying_out import CarryingOut
from lckv_megatron.study.description import read_study
from lckv_megatron.study.rows import read_rows, write_rows
from lckv_megatron.study.trainings import subjects_of
from megatron_ext.checkpointing import owner
from megatron_ext.checkpointing.folders import write_pointer
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import SHARED
from tests.lckv_megatron.study.studies import SIZES, content, write
from tests.megatron_ext.data.builders import train_sentencepiece
from tests.pages.stand_ins import stand_ins

SMALL = {"compression": {"layer_types": "0_0_2_2"}}
MORE = {"compression": {"layer_types": "0_0_0_0"}}
ZERO_OUT = {"compression": {"policy": {"name": "dmc", "stage": "zero_out"}}}
MODELS = {
    "plain": {},
    "again": {"stages": [{"share": 0.5}, {"share": 0.5, "settings": ZERO_OUT}]},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("study")
    tokenizer = train_sentencepiece(folder / "tokenizer.model")
    (folder / "held_out.txt").write_text("hello world, document 3 of the corpus: word word word\n" * 8)
    data = {**SIZES["data"], "tokenizer_type": "sentencepiece", "tokenizer_model": str(tokenizer)}
    return {
        "settings": {**SIZES, "data": data},
        "measure": {"text": [str(folder / "held_out.txt")], "sequences": 2, "repeats": 1, "context": 24},
        "budget": {"iterations": 2, "model": "plain"},
    }


def test_what_would_be_run(tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, content(MODELS, **files, seeds=[1, 2]))
    assert main([str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["plain", "1", "2"] and lines[2].split()[:5] == [
        "again",
        "1",
        "1",
        "+",
        "1",
    ]
    assert lines[-1].startswith("6 runs for 4 rows")
    assert not (tmp_path / "out").exists()


def test_choices(tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, content(MODELS, **files))
    words = [str(path), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*words, "--models", "again"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 runs for 1 rows")
    assert main([*words, "--models", "agian"]) == 2
    assert "--models has agian;" in capsys.readouterr().err
    assert main([*words, "--seeds", "3"]) == 2
    assert "--seeds has 3;" in capsys.readouterr().err
    assert main([str(path), "--output", str(tmp_path / "out"), "--rows-only"]) == 2
    assert "nothing has been measured there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--at-once", "2", "--devices", "0"],
            "--devices names 1, but --at-once 2 runs of --processes-per-run 1",
        ),
        (["--processes-per-run", "4", "--devices", "0", "1"], "need 4; name as many, or run fewer at once"),
        (["--hours", "0"], "--hours is 0; it must be above 0"),
    ],
)
def test_options_that_cannot_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent.yaml"), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_setting_that_cannot_work_is_said_before_anything_runs(
    tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    models = {**MODELS, "bad": {"settings": {"model": {"num_query_groups": 3}}}}
    assert main([str(write(tmp_path, content(models, **files))), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "bad" in error and "num_query_groups" in error
    assert not (tmp_path / "out").exists()


UNREADABLE = {"data": {"tokenizer_type": "none", "tokenizer_model": None}, "model": {"vocab_size": 320}}
FAMILY = {"compression": {"layer_types": "0_0|1_1|2_2|3"}}


@pytest.mark.parametrize(
    ("model", "measure", "message"),
    [
        ({"settings": UNREADABLE}, {}, "texts could not be measured; set it"),
        ({}, {"context": 32}, "measure.context is 32; it must be at most 31"),
        ({"settings": FAMILY}, {}, "it is a family of maps"),
        ({"settings": FAMILY, "export": "0_0_0_1"}, {}, "no map of the family"),
        ({"checkpoints": ["nowhere"]}, {}, "nowhere, which is not here"),
        ({"checkpoints": ["empty"]}, {}, "empty, which holds no model"),
        ({"checkpoints": ["hf"], "export": "0_0_2_2"}, {}, "which has one map: leave export out"),
        ({"checkpoints": ["hf"]}, {"context": 30}, "measure.context is 30; it must be at most 23"),
    ],
)
def test_what_could_not_be_measured_is_not_trained(
    model: dict[str, Any],
    measure: dict[str, Any],
    message: str,
    tmp_path: Path,
    files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = content({"plain": {"settings": {"model": {"vocab_size": 320}}}, "other": model}, **files)
    tree["measure"] = {**files["measure"], "context": 20, **measure}
    for name in ("empty", "hf"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"max_position_embeddings": 24}')
    assert main([str(write(tmp_path, tree)), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "other, seed 1: " in error and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": {"seq_length": 64}},
            "is not given, and models take texts of different lengths, 32, 64 tokens, so that losses",
        ),
        ({"data": {"tokenizer_model": "COPY"}}, "models have different tokenizers, so that losses per token"),
    ],
)
def test_what_could_not_be_compared_is_not_trained(
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "data" in settings:
        copy = shutil.copy(files["settings"]["data"]["tokenizer_model"], tmp_path / "other.model")
        settings = {"data": {"tokenizer_model": str(copy)}}
    tree = content({"plain": {}, "other": {"settings": settings}}, **files)
    tree["measure"] = {name: value for name, value in files["measure"].items() if name != "context"}
    words = [str(write(tmp_path, tree)), "--output", str(tmp_path / "out")]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_studies_in_one_folder(
    tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, content({"plain": {}}, **files)), tmp_path / "out"
    out.mkdir()
    write_rows(out / "rows.csv", [])
    parent = replace(owner.this_process(), pid=os.getppid(), started=owner._start_of(os.getppid()) or 0)
    (out / "lock.json").write_bytes(parent.to_json())
    assert main([str(path), "--output", str(out), "--rows-only"]) == 2
    error = capsys.readouterr().err
    assert f"--output: {out} is in use by" in error and "write over each other's rows" in error
    (out / "lock.json").write_bytes(replace(parent, started=1).to_json())
    assert main([str(path), "--output", str(out), "--rows-only"]) == 0  # that one is gone
    assert not (out / "lock.json").exists()


def test_speeds_are_those_of_one_comparison(tmp_path: Path, files: dict[str, Any]) -> None:
    """Of models that have rows already, too; measured again where another model or another clock is asked
    for."""
    out = tmp_path / "out"

    def work(*names: str, **measure: object) -> CarryingOut:
        tree = content({"plain": {}, "small": {"settings": SMALL}, "more": {"settings": MORE}}, **files)
        tree["measure"] = {**files["measure"], **measure}
        subjects = subjects_of(read_study(write(tmp_path, tree)))
        asked = [subject for subject in subjects if subject.entry.name in names]
        made = CarryingOut(
            read_study(tmp_path / "study.yaml"),
            asked,
            out,
            others=[subject for subject in subjects if subject not in asked],
        )
        for subject in made.unmeasured:
            folder = made._measured_place(subject)
            (folder / "huggingface").mkdir(parents=True, exist_ok=True)
            (folder / "huggingface" / "config.json").write_text("{}")
            made._measuring_job(subject)
            row = {"key": subject.key, "model": subject.entry.name, "seed": "1", "kv_bytes_per_token": "1"}
            made._rows[subject.key] = {**row, "loss": "1"}
        write_rows(out / "rows.csv", made._rows.values())
        return made

    def compared(made: CarryingOut) -> list[str] | None:
        job = made._speed_job()
        if job is None:
            return None
        folders = json.loads((out / "speed_task.json").read_bytes())["folders"]
        names = [made._rows[key]["model"] for key in folders]
        (out / "speed.json").write_text(json.dumps({key: {"tokens_per_second": 1.0} for key in folders}))
        made._take_in_speeds(out / "speed.json")
        write_rows(out / "rows.csv", made._rows.values())
        return [names[0], *sorted(names[1:])]

    assert compared(work("small")) is None, "what it is compared with is not here"
    assert compared(work("plain")) == ["plain", "small"]
    assert compared(work("plain", "small")) is None
    assert compared(work("more")) == ["plain", "more", "small"]
    assert compared(work("more")) is None
    assert compared(work("plain", "small", "more", clock="cpu")) == ["plain", "more", "small"]
    (out / "speed.json").unlink()  # a comparison that failed
    assert compared(work("plain", "small", "more", clock="cpu")) == ["plain", "more", "small"]


def test_a_run_that_ended_early_is_not_trained(tmp_path: Path, files: dict[str, Any]) -> None:
    read = read_study(write(tmp_path, content({"plain": {}}, **files)))
    work = CarryingOut(read, subjects_of(read), tmp_path / "out")
    (run,) = work.untrained
    checkpoints = tmp_path / "out" / "runs" / run.key / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_pointer(checkpoints, "iter_0000001")
    early = work._note_training(run, 1.0)
    assert early == "it ended at iter_0000001 instead of iter_0000002; give the same command to go on"
    assert work.untrained == [run]
    write_pointer(checkpoints, "iter_0000002")
    assert work._note_training(run, 1.0) is None and work.untrained == []


@pytest.fixture
def _warm_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each program of a study would import Megatron anew."""
    with stand_ins(tmp_path / "programs", hub=tmp_path / "hub") as environment:
        monkeypatch.setattr(sys, "executable", environment["PYTHON"])
        monkeypatch.setattr(os, "environ", environment)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_warm_programs")
def test_a_whole_study(tmp_path: Path, files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "elsewhere", SHARED)
    models = {"plain": {}, "from elsewhere": {"checkpoints": ["elsewhere"]}}
    path, out = write(tmp_path, content(models, **files)), tmp_path / "out"
    assert main([str(path), "--output", str(out), "--at-once", "2"]) == 0, capsys.readouterr().err
    plain, other = read_rows(out / "rows.csv").values()
    assert float(plain["kv_bytes_per_token"]) >= 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels
    assert float(plain["loss"]) > 0 and int(plain["training_tokens"]) == 128
    assert other["model"] == "from elsewhere" and other["training_flops"] == ""
    assert float(plain["tokens_per_second"]) > 0 < float(other["tokens_per_second"])
    assert (out / "front.png").stat().st_size > 10_000
    assert "| plain " in (out / "table.md").read_text()
    # given again: nothing is done again, and files that were lost are written again
    (out / "table.md").unlink()
    capsys.readouterr()
    assert main([str(path), "--output", str(out)]) == 0
    assert "begins" not in capsys.readouterr().err
    assert (out / "table.md").exists()

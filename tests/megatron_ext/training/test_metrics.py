"""Where a run's numbers go: JSON lines, TensorBoard, Weights & Biases."""

import errno
import json
import logging
import math
import os
import sys
import time
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import LoggingConfig
from megatron_ext.errors import ConfigError
from megatron_ext.training.metrics import (
    NOT_FINITE,
    WANDB_NOTE,
    JsonLines,
    MetricsWriter,
    check_places,
    json_line,
    read_metrics,
    reports_lack_validation,
)

REPORTS = {
    iteration: {"lm_loss": 10.0 / iteration, "consumed_tokens": 64 * iteration} for iteration in range(1, 8)
}


def write_reports(path, iterations, **options) -> None:
    with MetricsWriter(LoggingConfig(metrics_file=str(path)), **options) as writer:
        for iteration in iterations:
            writer.write(iteration, REPORTS[iteration])


def test_each_report_is_a_line_on_the_disk_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsWriter(LoggingConfig(metrics_file=str(path))) as writer:
        writer.write(1, {"lm_loss": 2.5, "consumed_tokens": 64, "note": "warm"})
        assert path.read_text() == '{"iteration": 1, "lm_loss": 2.5, "consumed_tokens": 64, "note": "warm"}\n'


@pytest.mark.parametrize("saved_at", [3, 5])
def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path, saved_at):
    write_reports(tmp_path / "straight", range(1, 8))
    write_reports(tmp_path / "resumed", range(1, 6))
    with (tmp_path / "resumed").open("a") as file:
        file.write('{"iteration": 6, "lm_l')  # killed while writing
    write_reports(tmp_path / "resumed", range(saved_at + 1, 8), resumed_iteration=saved_at)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "straight").read_bytes()


def test_a_fresh_run_keeps_the_reports_of_an_earlier_one_aside(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with caplog.at_level(logging.WARNING):
        for length in (2, 3, 4):
            write_reports(path, range(1, length + 1))
    lengths = {
        name: len(read_metrics(tmp_path / name))
        for name in ("metrics.jsonl", "metrics.1.jsonl", "metrics.2.jsonl")
    }
    assert lengths == {"metrics.jsonl": 4, "metrics.1.jsonl": 2, "metrics.2.jsonl": 3}
    assert (
        f"{path} holds the reports of an earlier run; it is now {tmp_path / 'metrics.1.jsonl'}" in caplog.text
    )


def test_numbers_that_json_lacks_are_null_with_a_note():
    record = json.loads(
        json_line(3, {"lm_loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "lr": 0.5})
    )
    notes = {"lm_loss": "nan", "grad_norm": "inf", "low": "-inf"}
    assert record == {
        "iteration": 3,
        "lm_loss": None,
        "grad_norm": None,
        "low": None,
        "lr": 0.5,
        NOT_FINITE: notes,
    }


def refuse_constants(text):
    raise AssertionError(f"{text} is no JSON")


@given(st.dictionaries(st.text(), st.floats() | st.integers() | st.text(), max_size=5))
def test_lines_are_always_valid_json(values):
    values.pop("iteration", None)
    values.pop(NOT_FINITE, None)
    line = json_line(7, values)
    assert line.count("\n") == 1
    record = json.loads(line, parse_constant=refuse_constants)
    finite = {
        name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)
    }
    assert {name: record[name] for name in finite} == finite
    assert set(record.get(NOT_FINITE, {})) == set(values) - set(finite)


def test_reading_leaves_out_an_unfinished_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_reports(path, (1, 2))
    path.write_text(path.read_text() + '{"iteration": 3, "lm')
    assert [report["iteration"] for report in read_metrics(path)] == [1, 2]
    path.write_text(path.read_text() + "\n" + json_line(4, {}))
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 3 is no report of a run"):
        read_metrics(path)


def test_a_line_too_deep_to_be_read_is_no_report(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"iteration": 1}\n' + "[" * 100_000 + '\n{"iteration": 2}\n')
    with pytest.raises(ConfigError, match=r"m\.jsonl, line 2 is no report of a run"):
        read_metrics(tmp_path / "m.jsonl")


def test_a_file_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError,
        match=r"logging.metrics_file .*file/metrics.jsonl cannot be written: (File exists|Not a directory)",
    ):
        MetricsWriter(LoggingConfig(metrics_file=str(tmp_path / "file" / "metrics.jsonl")))
    with pytest.raises(
        ConfigError, match=r"logging.tensorboard_dir .*file/board cannot be written: .*choose another"
    ):
        MetricsWriter(LoggingConfig(tensorboard_dir=str(tmp_path / "file" / "board")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_said_with_file_and_iteration(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink._file.close()
    sink._file = open("/dev/full", "w")  # noqa: SIM115 - closed by its owner
    with pytest.raises(
        ConfigError, match=r"metrics.jsonl cannot be written at iteration 9: No space left on device"
    ) as raised:
        sink.write(9, {})
    assert raised.value.__cause__.errno == errno.ENOSPC


def scalars(directory, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)], events.Tags()["scalars"]


def test_tensorboard_shows_the_numbers_and_forgets_what_a_resumed_run_repeats(tmp_path):
    config = LoggingConfig(tensorboard_dir=str(tmp_path))
    with MetricsWriter(config) as writer:
        for iteration in (1, 2, 3):
            writer.write(iteration, {"lm_loss": 1.0, "note": "a text"})
    with MetricsWriter(config, resumed_iteration=1) as writer:
        writer.write(2, {"lm_loss": 2.0})
    points, names = scalars(tmp_path, "lm_loss")
    assert points == [(1, 1.0), (2, 2.0)]
    assert names == ["lm_loss"]


def test_nothing_is_written_where_nothing_is_configured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    with MetricsWriter(LoggingConfig(wandb_project="p", wandb_mode="disabled")) as writer:
        writer.write(1, {"lm_loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 7)
    config = LoggingConfig(wandb_project="project", wandb_name="first", wandb_mode="offline")
    with MetricsWriter(config, settings={"train": {"seed": 1234}}) as writer:
        writer.write(1, {"lm_loss": 2.5})
        writer.write(2, {"lm_loss": math.nan})
    wait_until(lambda: any(b"lm_loss" in path.read_bytes() for path in tmp_path.rglob("*.wandb")), seconds=60)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]


def wait_until(condition, *, seconds):
    """wandb's own process may write the run's last records after `finish` has returned."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, init):
    module = types.SimpleNamespace(init=init, Settings=dict, Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_settings_and_every_report(monkeypatch):
    run, asked = FakeRun(), {}
    fake_wandb(monkeypatch, lambda **options: asked.update(options) or run)
    config = LoggingConfig(wandb_project="project", wandb_name="first", wandb_mode="online")
    with MetricsWriter(config, settings={"train": {"seed": 1234}}) as writer:
        writer.write(1, {"lm_loss": 2.5})
    assert (asked["project"], asked["name"], asked["mode"]) == ("project", "first", "online")
    assert asked["config"] == {"train": {"seed": 1234}}
    assert asked["settings"] == {"disable_code": True, "disable_git": True, "console": "off"}
    assert run.logged == [(1, {"lm_loss": 2.5})]
    assert run.finished


def test_wandb_that_refuses(monkeypatch):
    def init(**_):
        raise module.Error("no API key.")

    module = fake_wandb(monkeypatch, init)
    with pytest.raises(
        ConfigError,
        match=r"logging.wandb_project p cannot .* is online\): no API key. Set logging.wandb_mode",
    ):
        MetricsWriter(LoggingConfig(wandb_project="p"))


def test_a_resumed_run_goes_on_with_the_same_run_of_wandb(tmp_path, monkeypatch):
    asked, ids = [], iter(["first", "second", "third"])

    def init(**options):
        asked.append((options["id"], options["resume"]))
        run = FakeRun()
        run.id = options["id"] or next(ids)
        return run

    fake_wandb(monkeypatch, init)
    config = LoggingConfig(wandb_project="project")
    save, elsewhere = tmp_path / "save", tmp_path / "elsewhere"
    for folder in (save, elsewhere):
        folder.mkdir()
    MetricsWriter(config, notes=[save]).close()
    MetricsWriter(config, notes=[save], resumed_iteration=3).close()
    MetricsWriter(config, notes=[elsewhere, save], resumed_iteration=3).close()
    MetricsWriter(config, notes=[elsewhere], resumed_iteration=5).close()
    assert asked == [(None, None), *[("first", "allow")] * 3]
    MetricsWriter(LoggingConfig(wandb_project="other"), notes=[save], resumed_iteration=3).close()
    MetricsWriter(config, notes=[elsewhere]).close()  # a fresh run into the same folder
    assert asked[4:] == [(None, None)] * 2
    assert json.loads((elsewhere / WANDB_NOTE).read_text()) == {"project": "project", "id": "third"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"project": "project", "id": 3}', b"[" * 100_000])
def test_a_damaged_note_of_the_run_of_wandb_is_as_none(tmp_path, monkeypatch, content):
    asked = []

    def init(**options):
        asked.append(options["id"])
        run = FakeRun()
        run.id = "new"
        return run

    fake_wandb(monkeypatch, init)
    (tmp_path / WANDB_NOTE).write_bytes(content)
    MetricsWriter(LoggingConfig(wandb_project="project"), notes=[tmp_path], resumed_iteration=3).close()
    assert asked == [None]
    assert json.loads((tmp_path / WANDB_NOTE).read_text())["id"] == "new"


def test_wandb_offline_goes_on_with_the_same_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the folders of the test before
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    config = LoggingConfig(wandb_project="project", wandb_mode="offline")
    for resumed in (0, 2):
        with MetricsWriter(config, resumed_iteration=resumed, notes=[tmp_path]) as writer:
            writer.write(resumed + 1, {"lm_loss": 2.5})
    note = json.loads((tmp_path / WANDB_NOTE).read_text())
    wait_until(lambda: any(tmp_path.rglob("*.wandb")), seconds=60)
    assert {path.name for path in tmp_path.rglob("*.wandb")} == {f"run-{note['id']}.wandb"}


def test_places_are_tried_before_anything_is_built(tmp_path):
    (tmp_path / "file").write_text("not mine")
    (tmp_path / "folder").mkdir()
    good = LoggingConfig(
        metrics_file=str(tmp_path / "new" / "metrics.jsonl"), tensorboard_dir=str(tmp_path / "board" / "1")
    )
    check_places(good)
    check_places(good)
    check_places(LoggingConfig(tensorboard_dir="s3://bucket/board"))
    for path in ("file/metrics.jsonl", "folder", "nul\0l"):
        with pytest.raises(ConfigError, match=r"logging\.metrics_file .* choose another"):
            check_places(LoggingConfig(metrics_file=str(tmp_path / path)))
    for path in ("file", "file/board", "/proc/none/board", "nul\0l"):
        with pytest.raises(
            ConfigError, match=r"logging\.tensorboard_dir .* cannot be written: .*choose another"
        ):
            check_places(LoggingConfig(tensorboard_dir=str(tmp_path / path)))
    assert (tmp_path / "file").read_text() == "not mine"


def test_a_pipe_is_no_metrics_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe is no file that can be written; choose another"):
        check_places(LoggingConfig(metrics_file=str(tmp_path / "pipe")))


def test_a_resumed_run_drops_no_lines_of_a_file_of_something_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nand more of them\n")
    with pytest.raises(ConfigError, match=r"notes.txt, line 1 is no report of a run"):
        write_reports(path, (4,), resumed_iteration=3)
    assert path.read_text() == "my notes\nand more of them\n"


def test_whether_an_evaluation_is_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not reports_lack_validation(path, 3)
    path.write_text(json_line(2, {"lm_loss": 1.0}) + json_line(3, {"lm_loss": 1.0}))
    assert reports_lack_validation(path, 3)
    assert not reports_lack_validation(path, 1)
    path.write_text(path.read_text() + json_line(3, {"validation_loss": 1.0}))
    assert not reports_lack_validation(path, 3)

"""What a signal does to a run: the step ends, the work is saved, a second signal does not cut off a save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.signals import ENDING, Interrupted
from megatron_ext.training import iteration, stopping
from megatron_ext.training.stopping import StopRequest, stop_requests
from tests.megatron_ext.training.runs import logged_to, messages, reports, series, tiny_run, train
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parent.parent.parent.parent
NOTHING_TO_DO = (
    "nothing to do: the checkpoint in {folder} is of iteration 6, and train.train_iters is {iterations}"
)
EVALUATION = {"eval_interval": 3, "eval_iters": 4}


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_to_one_rank_stops_all(number: signal.Signals) -> None:
    assert run_on_ranks(2, reasons_to_stop, number) == [(None, f"signal {number.name}")] * 2


def reasons_to_stop(number: int) -> tuple[str | None, str | None]:
    import torch.distributed as dist

    before_all = signal.signal(number, signal.SIG_DFL)
    try:
        with stop_requests(exit_duration_minutes=None) as stop:
            before = stop.agreed()
            if dist.get_rank() == 1:
                os.kill(os.getpid(), number)
            return before, stop.agreed()
    finally:
        signal.signal(number, before_all)


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost() -> None:
    assert run_on_ranks(2, reasons_when_signalled_late) == [(None, "signal SIGTERM")] * 2


def reasons_when_signalled_late() -> tuple[str | None, str | None]:
    """The signal comes when this rank has said that it knows of none."""
    import torch.distributed as dist

    all_reduce = dist.all_reduce
    with stop_requests(exit_duration_minutes=None) as stop, pytest.MonkeyPatch.context() as patch:

        def slow(*arguments, **options):
            if dist.get_rank() == 1:
                stop.note(signal.SIGTERM)
            return all_reduce(*arguments, **options)

        patch.setattr(dist, "all_reduce", slow)
        before = stop.agreed()
        patch.undo()
        return before, stop.agreed()


def test_an_iteration_is_saved_before_it_is_evaluated(tmp_path: Path) -> None:
    run = tiny_run(train=EVALUATION, checkpoint={"save": str(tmp_path), "save_interval": 3})
    [events] = run_on_ranks(1, events_of, run)
    assert events == ["save 3", "evaluate 3", "save 6", "evaluate 6"]


def events_of(run: RunConfig) -> list[str]:
    events = []
    save, validate = iteration._save, iteration._validate

    def noted_save(training, position, *others):
        events.append(f"save {position.iteration}")
        return save(training, position, *others)

    def noted_validate(training, position, *others):
        events.append(f"evaluate {position.iteration}")
        return validate(training, position, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "_save", noted_save)
        patch.setattr(iteration, "_validate", noted_validate)
        train(run)
    return events


@pytest.mark.parametrize("interval", [3, 0], ids=["saved before it", "saved after it"])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(tmp_path: Path, interval: int) -> None:
    """The signal comes to one of two ranks with the first of four batches. The run that goes on writes what
    is missing, and its reports are those of a run that was not stopped."""
    straight = logged_to(tiny_run(train=EVALUATION), tmp_path / "straight.jsonl")
    run_on_ranks(2, train, straight)
    saving = {"save": str(tmp_path / "save"), "save_interval": interval}
    run = logged_to(tiny_run(train=EVALUATION, checkpoint=saving), tmp_path / "stopped.jsonl")
    assert run_on_ranks(2, stopped_while_evaluating, run) == [(3, 1)] * 2
    assert (tmp_path / "save" / "iter_0000003" / "manifest.json").exists()
    assert series(tmp_path / "stopped.jsonl", "validation_loss") == []
    going_on = tiny_run(train=EVALUATION, checkpoint={**saving, "load": str(tmp_path / "save")})
    assert run_on_ranks(2, train, logged_to(going_on, tmp_path / "stopped.jsonl")) == [6, 6]
    for name in ("iteration", "lm_loss", "validation_loss", "grad_norm"):
        assert series(tmp_path / "stopped.jsonl", name) == series(tmp_path / "straight.jsonl", name), name


def stopped_while_evaluating(run: RunConfig) -> tuple[int, int]:
    """Iteration reached, and batches of the first evaluation."""
    import torch.distributed as dist

    batches = []
    evaluate = iteration.evaluate

    def interrupted(model, samples, make_batch, *others, **options):
        def signalled(micro_batch):
            batches.append(micro_batch)
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return make_batch(micro_batch)

        return evaluate(model, samples, signalled, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "evaluate", interrupted)
        reached = train(run)
    return reached, len(batches) // (run.train.global_batch_size // dist.get_world_size())


def test_the_last_evaluation_is_made_up_for_and_then_there_is_nothing_to_do(tmp_path: Path) -> None:
    place = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save")}
    run = logged_to(tiny_run(train=EVALUATION, checkpoint={"save": place["save"]}), tmp_path / "run.jsonl")
    run_on_ranks(1, train, run)
    lines = (tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    assert b"validation_loss" in lines[-1]
    again = logged_to(tiny_run(train=EVALUATION, checkpoint=place), tmp_path / "run.jsonl")
    [said] = run_on_ranks(1, messages, again)
    assert said[-1] == NOTHING_TO_DO.format(folder=tmp_path / "save", iterations=6)
    assert (tmp_path / "run.jsonl").read_bytes() == b"".join(lines)
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines[:-1]))  # as a crash in the evaluation leaves it
    run_on_ranks(1, train, again)
    assert (tmp_path / "run.jsonl").read_bytes() == b"".join(lines)


def test_a_checkpoint_past_the_last_iteration_has_nothing_to_do(tmp_path: Path) -> None:
    """Also with another batch size, with which fewer samples are asked for than were consumed."""
    run_on_ranks(1, train, tiny_run(checkpoint={"save": str(tmp_path)}))
    shorter = tiny_run(train={"train_iters": 3, "global_batch_size": 8}, checkpoint={"load": str(tmp_path)})
    [said] = run_on_ranks(1, messages, shorter)
    assert said[-1] == NOTHING_TO_DO.format(folder=tmp_path, iterations=3)


def test_a_run_that_saves_nothing_says_so(tmp_path: Path) -> None:
    run = tiny_run(train={"train_iters": 1000})
    [(status, line)] = run_on_ranks(1, stopped_at_once, run)
    assert status == 128 + signal.SIGTERM
    assert line == "stopped after iteration 1: signal SIGTERM; nothing is saved, checkpoint.save is not set"


def stopped_at_once(run: RunConfig) -> tuple[int, str]:
    train_step = iteration.train_step

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "train_step", interrupted)
        with pytest.raises(Interrupted) as stop:
            train(run)
    return stop.value.exit_status, str(stop.value)


class EndedError(Exception):
    """Instead of the process's end."""


@pytest.fixture
def request_to_stop(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    def end(number: int, line: str) -> None:
        raise EndedError(line)

    monkeypatch.setattr(stopping, "end_at_once", end)
    request = StopRequest(None)
    monkeypatch.setattr(request._repetition, "is_second", iter([False, True, True]).__next__)
    return request


def test_a_second_signal_ends_the_run_at_once(request_to_stop: StopRequest) -> None:
    request_to_stop.watch(signal.SIGINT)
    with pytest.raises(
        EndedError, match="stopped at once by a second signal, SIGTERM; steps since the last save are lost"
    ):
        request_to_stop.watch(signal.SIGTERM)


def test_a_second_signal_waits_for_a_save(request_to_stop: StopRequest) -> None:
    done = []
    request_to_stop.watch(signal.SIGINT)

    def save() -> None:
        with request_to_stop.saving():
            request_to_stop.watch(signal.SIGTERM)
            done.append("saved")

    with pytest.raises(EndedError):
        save()
    assert done == ["saved"]


def test_a_second_signal_waits_for_a_save_in_the_background(request_to_stop: StopRequest) -> None:
    request_to_stop.save_in_flight(True)
    request_to_stop.watch(signal.SIGINT)
    request_to_stop.watch(signal.SIGTERM)
    with pytest.raises(EndedError):
        request_to_stop.save_in_flight(False)


PROGRAM = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
from pathlib import Path
import pretrain_lckv
from megatron_ext.training import iteration
save = iteration._save
def slow(*arguments):
    print("saving", flush=True)
    time.sleep(4)
    return save(*arguments)
iteration._save = slow
raise SystemExit(pretrain_lckv.main(sys.argv[1:]))
"""


def test_signals_that_come_during_the_last_save_do_not_lose_it(tmp_path: Path) -> None:
    import yaml

    from tests.megatron_ext.training.runs import SETTINGS

    settings = {**SETTINGS, "checkpoint": {"save": str(tmp_path / "save")}}
    settings["train"] = {**SETTINGS["train"], "train_iters": 100000}
    settings["logging"] = {"metrics_file": str(tmp_path / "metrics.jsonl"), "progress_bar": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--config", str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 200
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    for _ in range(2):
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    last = errors.splitlines()[-1]
    assert "stopped after iteration" in last
    assert f"signal SIGINT; saved in {tmp_path / 'save'}" in last
    iterations = [report["iteration"] for report in reports(metrics)]
    assert (tmp_path / "save" / f"iter_{iterations[-1]:07d}" / "manifest.json").exists()

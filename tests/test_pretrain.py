"""The program as a user starts it: in processes of its own, with settings that are right and wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_ext.checkpointing.lock import FolderLock
from tests.megatron_ext.training.runs import SETTINGS
from tests.pages.stand_ins import stand_ins

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "pretrain_lckv.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(folder: Path, *options: str, ranks: int = 1, **settings: dict) -> list[str]:
    merged = {name: {**SETTINGS.get(name, {}), **settings.get(name, {})} for name in {*SETTINGS, *settings}}
    (folder / "run.yaml").write_text(yaml.safe_dump(merged))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    return [sys.executable, *launcher, PROGRAM, "--config", str(folder / "run.yaml"), *options]


def start(*arguments: str, environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)


@dataclass(frozen=True)
class Warm:
    """Starts the same processes as forks of one that has imported everything, for what is not about starting
    and ending."""

    environment: Mapping[str, str]

    def words(self, python: str, *arguments: str) -> list[str]:
        return [str(shutil.which("python", path=self.environment["PATH"])), *arguments]

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return start(*self.words(*arguments), environment=self.environment)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("programs")
    with stand_ins(folder, hub=folder / "hub") as environment:
        yield Warm(environment)


def test_a_run_on_two_processes(tmp_path: Path) -> None:
    done = start(*command(tmp_path, f"--logging.metrics_file={tmp_path / 'metrics.jsonl'}", ranks=2))
    assert done.returncode == 0, done.stderr
    assert "predicted cost" in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train.train_iter=3"], "did you mean train.train_iters"),
        (["--parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size"),
        (["--compression.layer_types=0_1t_2_3"], r"entry 1 (character 3) is '1t'"),
        (["--data.mock=false", "--data.data_path=nowhere/data"], "nowhere/data"),
        (["--checkpoint.load=nowhere"], "checkpoint.load: nowhere is not a directory that exists"),
    ],
)
def test_one_clear_error_and_no_traceback(options: list[str], said: str, tmp_path: Path) -> None:
    done = start(*command(tmp_path, *options))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_settings_on_several_processes_end_all_of_them(tmp_path: Path) -> None:
    started = time.monotonic()
    options = ["--parallel.pipeline_model_parallel_size=2", "--parallel.pipeline_model_parallel_layout=Et"]
    done = start(*command(tmp_path, *options, ranks=2))
    assert done.returncode != 0
    assert "parallel.pipeline_model_parallel_layout is 'Et', which has 1 parts" in done.stderr
    assert "parallel.pipeline_model_parallel_size" in done.stderr
    assert time.monotonic() - started < 120
    error = done.stderr[: done.stderr.index("Sending process")].partition("error: ")[2].splitlines()[:-1]
    last = done.stderr.splitlines()[-len(error) :]
    assert last == [f"error: {error[0]}", *error[1:]]  # behind all that torchrun says
    assert f"  traceback : error: {error[0]}\n" in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT must be set too"),
        ({"WORLD_SIZE": ""}, "is ''"),
    ],
)
def test_variables_that_cannot_be(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
        env={**ENVIRONMENT, **variables},
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_metrics_file_that_cannot_be_is_said_once(tmp_path: Path) -> None:
    done = start(*command(tmp_path, "--logging.metrics_file=/proc/none/metrics.jsonl", ranks=2))
    assert done.returncode != 0
    before_torchrun = done.stderr[: done.stderr.index("torch/distributed/elastic")]
    assert before_torchrun.count("error: ") == 1
    assert "logging.metrics_file /proc/none/metrics.jsonl cannot be written" in done.stderr.splitlines()[-1]
    assert "predicted cost" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_ctrl_c_under_torchrun_saves_and_has_the_last_word(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    options = [f"--checkpoint.save={tmp_path / 'save'}", f"--logging.metrics_file={metrics}"]
    arguments = command(tmp_path, *options, ranks=2, train={"train_iters": 100000})
    heeding = "import signal, sys, runpy\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    run_torchrun = f"{heeding}runpy.run_module('torch.distributed.run', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", run_torchrun, *arguments[3:]],
        env=ENVIRONMENT,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not reported(metrics) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun passes it on
    _, errors = process.communicate(timeout=120)
    assert errors.count("stopped after iteration") == 2, errors
    assert errors.splitlines()[-1].startswith("stopped after iteration ")
    assert errors.endswith(f": signal SIGINT; saved in {tmp_path / 'save'}\n")
    assert (tmp_path / "save" / "latest").exists()


LONGER = {"train_iters": 40}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> list[tuple[int, float, float]]:
    """What a run reports that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    metrics = folder / "metrics.jsonl"
    assert warm.start(*command(folder, f"--logging.metrics_file={metrics}", train=LONGER)).returncode == 0
    return losses(metrics)


def losses(metrics: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, metrics.read_text().splitlines())
    return [(line["iteration"], line["lm_loss"], line["grad_norm"]) for line in lines]


def saving(folder: Path) -> list[str]:
    """A command that saves while it trains."""
    options = [f"--checkpoint.save={folder / 'save'}", f"--logging.metrics_file={folder / 'metrics.jsonl'}"]
    return command(folder, *options, "--checkpoint.save_interval=4", train=LONGER)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_killed_and_started_again(
    tmp_path: Path, straight: list[tuple[int, float, float]], warm: Warm
) -> None:
    """kill -9 in the middle; the same command goes on from the last checkpoint to the same losses."""
    process = subprocess.Popen(saving(tmp_path), env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "save" / "latest")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert (tmp_path / "save" / "lock.json").exists()
    assert warm.start(*saving(tmp_path)).returncode == 0
    assert losses(tmp_path / "metrics.jsonl") == straight
    assert not (tmp_path / "save" / "lock.json").exists()


def test_torchrun_restarts_a_killed_run(
    tmp_path: Path, straight: list[tuple[int, float, float]], warm: Warm
) -> None:
    python, *program = warm.words(*saving(tmp_path))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1"]
    process = subprocess.Popen(
        [python, *launcher, *program], env=warm.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "save" / "latest")
    os.kill(json.loads((tmp_path / "save" / "lock.json").read_bytes())["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "going on from checkpoint.save" in errors
    assert losses(tmp_path / "metrics.jsonl") == straight


def test_a_second_run_into_the_folder_is_told_of_the_first(tmp_path: Path) -> None:
    save = tmp_path / "save"
    lock = FolderLock(save)
    lock.take()
    done = start(*command(tmp_path, f"--checkpoint.save={save}", ranks=2))
    lock.release()
    assert done.returncode != 0
    said = f"error: checkpoint.save: {save} is in use by process {os.getpid()}"
    by_ranks = [line for line in done.stderr.splitlines() if re.match(rf"[\d:]+ (rank \d: )?{said}", line)]
    assert len(by_ranks) == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(said), "after torchrun's own words"


def test_terminated_runs_save_and_end_well(tmp_path: Path) -> None:
    saving = [
        f"--checkpoint.save={tmp_path / 'save'}",
        f"--logging.metrics_file={tmp_path / 'metrics.jsonl'}",
    ]
    arguments = command(tmp_path, *saving, train={"train_iters": 100000}, data={"num_workers": 1})
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not reported(tmp_path / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(
        process.pid, signal.SIGTERM
    )  # as batch systems do: to all processes of the job, data readers included
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "signal SIGTERM" in errors
    assert (tmp_path / "save" / "latest").exists()


def reported(metrics: Path) -> bool:
    """Whether a first step is done, so that all processes of the run are up."""
    return metrics.exists() and metrics.stat().st_size > 0

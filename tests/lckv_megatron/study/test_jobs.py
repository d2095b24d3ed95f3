"""Programs run in order, at once where they may, and leave nothing behind."""

import os
import sys
import time
from pathlib import Path

import pytest

from lckv_megatron.study.jobs import Job, JobRunner, Slots

WAITS = "import time; print('here', flush=True); time.sleep(60)"


def job(folder: Path, name: str, *needs: str, code: str = "print('x')", done=lambda seconds: None) -> Job:
    return Job(name, [sys.executable, "-S", "-c", code], folder / f"{name}.log", needs, done)


def test_needs_come_first(tmp_path: Path) -> None:
    order: list[str] = []
    jobs = [
        job(tmp_path, "c", "b", done=lambda seconds: order.append("c")),
        job(tmp_path, "b", "a", "there already", done=lambda seconds: order.append("b")),
        job(tmp_path, "a", done=lambda seconds: order.append("a")),
    ]
    assert JobRunner(Slots(2), lambda line: None).run(jobs) == []
    assert order == ["a", "b", "c"]


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    lines: list[str] = []
    jobs = [
        job(tmp_path, "bad", code="print('what was wrong'); raise SystemExit(3)"),
        job(tmp_path, "after", "bad"),
        job(tmp_path, "later", "after"),
        job(tmp_path, "good"),
    ]
    (failure,) = JobRunner(Slots(1), lines.append).run(jobs)
    assert str(failure).startswith("bad: exit status 3; ") and "what was wrong" in str(failure)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bad.log", "good.log"]
    assert "after: left out, for what it needs has failed" in lines
    assert "later: left out, for what it needs has failed" in lines


def test_an_exit_status_of_0_is_not_all(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "short", done=lambda seconds: "it ended early"), job(tmp_path, "after", "short")]
    (failure,) = JobRunner(Slots(1), lambda line: None).run(jobs)
    assert failure.reason == "it ended early" and not (tmp_path / "after.log").exists()


def test_devices_are_shared_out(tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    jobs = [job(tmp_path, name, code=code) for name in "ab"]
    assert JobRunner(Slots(2, ("0", "1", "2", "3")), lambda line: None).run(jobs) == []
    assert {(tmp_path / f"{name}.log").read_text().strip() for name in "ab"} == {"0,2", "1,3"}


def test_a_program_that_takes_too_long(tmp_path: Path) -> None:
    (failure,) = JobRunner(Slots(1, hours=0.5 / 3600), lambda line: None).run(
        [job(tmp_path, "slow", code=WAITS)]
    )
    assert "it took more than" in failure.reason


def test_what_stops_the_study_ends_its_programs(tmp_path: Path) -> None:
    code = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {WAITS}"

    def stop(line: str) -> None:
        if "second" in line:
            until = time.monotonic() + 20
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                assert time.monotonic() < until
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        JobRunner(Slots(2), stop).run([job(tmp_path, "first", code=code), job(tmp_path, "second")])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)

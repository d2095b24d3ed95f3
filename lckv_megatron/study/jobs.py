"""Programs that wait for each other, several at once, each on devices of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 60.0
"""For a program that is asked to end: a run writes a checkpoint."""

_TOLD_LINES = 12
"""Of a program that failed."""


@dataclass(frozen=True)
class Job:
    """A program, and what must be done before it."""

    name: str
    """Of its own."""

    command: Sequence[str]
    log: Path
    """What it prints."""

    needs: tuple[str, ...] = ()
    """Names of other jobs."""

    done: Callable[[float], str | None] = lambda seconds: None
    """Called where its exit status is 0, with the seconds that it took; returns why it has failed all the
    same."""

    title: str = ""
    """For people; default: its name."""

    def __str__(self) -> str:
        return self.title or self.name


@dataclass(frozen=True)
class Failure:
    """A job that failed."""

    job: Job
    reason: str

    def __str__(self) -> str:
        return f"{self.job}: {self.reason}; {self.job.log} ends with\n{_end_of(self.job.log)}"


@dataclass(frozen=True)
class Slots:
    """How many programs run at once, and on what."""

    at_once: int
    devices: tuple[str, ...] = ()
    """CUDA devices, which the programs share out among them; none: each may use what there is."""

    hours: float = 24.0
    """After which a program is ended."""

    def environments(self) -> list[dict[str, str]]:
        """Of the programs: one for each that runs at once."""
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        environments = []
        for slot in range(self.at_once):
            environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
            if self.devices:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[slot :: self.at_once])
            environments.append(environment)
        return environments


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str]
    since: float = field(default_factory=time.monotonic)


class JobRunner:
    """Runs jobs in order as far as they need not wait; what needs a failed one is not run."""

    def __init__(self, slots: Slots, report: Callable[[str], object]) -> None:
        """`report` gets a line when a job begins and when it ends."""
        self._slots, self._report = slots, report
        self._free = slots.environments()
        self._running: list[_Running] = []

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Run them all, the first that need not wait first; what failed."""
        waiting, failures = [*jobs], list[Failure]()
        undone = {job.name for job in jobs}
        try:
            while waiting or self._running:
                self._start(waiting, undone)
                time.sleep(_LOOK_SECONDS)
                for failure in self._ended(undone):
                    failures.append(failure)
                    waiting = self._without_dependents(waiting, {failure.job.name})
        finally:
            self._stop_all()
        return failures

    def _start(self, waiting: list[Job], undone: set[str]) -> None:
        for job in [job for job in waiting if undone.isdisjoint(job.needs)][: len(self._free)]:
            waiting.remove(job)
            environment = self._free.pop(0)
            self._report(f"{job}: begins")
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("wb") as log:
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self._running.append(_Running(job, process, environment))

    def _ended(self, undone: set[str]) -> list[Failure]:
        failures = []
        for running in [*self._running]:
            job, seconds = running.job, time.monotonic() - running.since
            status = running.process.poll()
            if status is None and seconds > self._slots.hours * 3600:
                _end([running.process])
                failures.append(Failure(job, f"it took more than {self._slots.hours:g} hours"))
            elif status is None:
                continue
            elif reason := f"exit status {status}" if status else job.done(seconds):
                failures.append(Failure(job, reason))
                self._report(f"{job}: failed, {reason}")
            else:
                undone.discard(job.name)
                self._report(f"{job}: done in {seconds:,.0f} s")
            self._running.remove(running)
            self._free.append(dict(running.environment))
        return failures

    def _without_dependents(self, waiting: list[Job], lost: set[str]) -> list[Job]:
        kept = []
        for job in waiting:
            if lost.isdisjoint(job.needs):
                kept.append(job)
            else:
                lost.add(job.name)
                self._report(f"{job}: left out, for what it needs has failed")
        return kept

    def _stop_all(self) -> None:
        _end([running.process for running in self._running])
        self._running.clear()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Programs and what they have started; those that do not end when they are asked to are killed."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    until = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TOLD_LINES:])

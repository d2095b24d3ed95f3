"""Signals that end programs: one line, and nothing half-written; a second one ends at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_ext import signals
from megatron_ext.signals import Interrupted, Repetition, handling, interruptible

ROOT = Path(__file__).parent.parent.parent
WAITING = """
import time
from megatron_ext.console import exit_status, set_up_logging
def program():
    try:
        print("ready", flush=True)
        for _ in range(600):  # a sleep may begin between a signal and its handler, which waits for its end
            time.sleep(0.1)
    finally:
        print("cleaning up", flush=True)
        time.sleep({clean_up})
set_up_logging()
raise SystemExit(exit_status(program))
"""
CALM = "import signal\nfor number in signals.ENDING:\n    signal.signal(number, signal.SIG_DFL)\n"


def start(program: str) -> subprocess.Popen[str]:
    """A process that heeds signals, whatever the tests were told to ignore."""
    program = f"from megatron_ext import signals\n{CALM}{program}"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_program_ends_with_one_line(number: signal.Signals) -> None:
    process = start(WAITING.format(clean_up=0))
    process.send_signal(number)
    said, errors = process.communicate(timeout=30)
    assert said == "cleaning up\n"
    assert errors.endswith(f"stopped by {number.name}\n")
    assert len(errors.splitlines()) == 1
    assert process.returncode == 128 + number


def test_a_second_signal_ends_it_at_once_and_the_same_one_sent_twice_does_not() -> None:
    process = start(WAITING.format(clean_up=40))
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning up\n"
    process.send_signal(signal.SIGTERM)  # as a launcher does that passes on what the group got too
    time.sleep(signals._SAME_REQUEST_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert errors == "\nstopped at once by a second signal, SIGTERM\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_what_is_ignored_stays_ignored() -> None:
    """nohup has a program ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.ENDING]
    with pytest.raises(Interrupted, match="stopped by SIGUSR1"), interruptible():
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_only_the_main_thread_may_handle_signals() -> None:
    entered = []

    def enter() -> None:
        with handling(lambda number, frame: None), signals.watching(lambda number: None):
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


def test_a_thread_sees_signals_while_no_handler_runs() -> None:
    seen, heard = [], threading.Event()

    def watch(number: int) -> None:
        seen.append(number)
        heard.set()

    with handling(lambda number, frame: None), signals.watching(watch):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard.wait(10)
    assert seen == [signal.SIGUSR1]
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_that_python_handles_are_not_watched() -> None:
    """torch's data loader handles SIGCHLD: the end of a reading process is no request to stop."""
    seen, heard = [], threading.Event()

    def watch(number: int) -> None:
        seen.append(number)
        heard.set()

    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        with handling(lambda number, frame: None), signals.watching(watch):
            signal.raise_signal(signal.SIGCHLD)
            signal.raise_signal(signal.SIGUSR1)
            assert heard.wait(10)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert seen == [signal.SIGUSR1]


def test_deferred_signals_come_at_the_end() -> None:
    """Also those that another thread of the process takes."""
    done, ready = [], threading.Event()
    sleeper = threading.Thread(target=ready.wait, daemon=True)
    sleeper.start()

    def work() -> None:
        with signals.deferred():
            signal.pthread_kill(sleeper.ident or 0, signal.SIGTERM)
            time.sleep(0.05)
            done.append("whole")
        done.append("never")

    with pytest.raises(Interrupted, match="stopped by SIGTERM"), interruptible():
        work()
    ready.set()
    assert done == ["whole"]


def test_deferral_changes_nothing_without_a_signal() -> None:
    before = [signal.getsignal(number) for number in signals.ENDING]
    with signals.deferred():
        pass
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 100.5, 103.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    repetition = Repetition()
    assert [repetition.is_second() for _ in range(3)] == [False, False, True]

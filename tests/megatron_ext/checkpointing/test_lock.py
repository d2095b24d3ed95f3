"""One run at a time in a folder of checkpoints: who holds it, and when a dead one's lock is taken over."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.checkpointing import lock as lock_module
from megatron_ext.checkpointing.errors import DiskFullError, FolderInUseError, UnwritableFolderError
from megatron_ext.checkpointing.lock import LOCK_NAME, FolderLock
from megatron_ext.checkpointing.owner import Owner, is_gone, is_living_token, read_owner, this_process

PROGRAM = """
import sys, time
from pathlib import Path
from megatron_ext.checkpointing.lock import FolderLock
FolderLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(120)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds tmp_path."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(**changes: object) -> Owner:
    """A process on another machine."""
    owner = replace(this_process(), host="node7", machine="boot pid:[1]", pid=17)
    return replace(owner, **changes)  # type: ignore[arg-type]


def leave_lock(directory: Path, owner: Owner, seconds_ago: float = 0.0) -> Path:
    path = directory / LOCK_NAME
    path.write_bytes(owner.to_json())
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def quick(directory: Path) -> FolderLock:
    return FolderLock(directory, beat_seconds=0.05, stale_seconds=0.4)


def test_it_is_there_while_it_is_held(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "new" / "folder")
    lock.take()
    owner = read_owner((tmp_path / "new" / "folder" / LOCK_NAME).read_bytes())
    assert owner is not None and (owner.pid, owner.host) == (os.getpid(), socket.gethostname())
    lock.release()
    assert os.listdir(tmp_path / "new" / "folder") == []
    lock.release()


def test_a_process_may_take_again_what_it_has(tmp_path: Path) -> None:
    run, save = FolderLock(tmp_path), FolderLock(tmp_path)
    run.take()
    save.take()
    save.release()
    assert (tmp_path / LOCK_NAME).exists(), "who has taken it first gives it back"
    run.release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_another_living_process_is_named_at_once(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    with pytest.raises(FolderInUseError) as caught:
        FolderLock(tmp_path).take()
    assert time.monotonic() - started < 5
    for part in (
        f"checkpoint.save: {tmp_path} is in use by process {other.pid} on {socket.gethostname()}",
        f", since {time.strftime('%Y-%m-%d')}",
        "last seen",
        "choose another checkpoint.save",
        f"delete {tmp_path / LOCK_NAME}",
    ):
        assert part in str(caught.value)


def test_after_a_kill_it_is_free_at_once(
    tmp_path: Path, other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    other.send_signal(signal.SIGKILL)  # not waited for: a zombie is gone too
    deadline = time.monotonic() + 30
    while is_gone(read_owner((tmp_path / LOCK_NAME).read_bytes()), this_process()) is False:  # type: ignore[arg-type]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock = FolderLock(tmp_path)
    lock.take()
    assert "waiting" not in caplog.text
    assert os.listdir(tmp_path) == [LOCK_NAME]
    lock.release()


def test_a_later_process_with_the_same_number_is_another(tmp_path: Path) -> None:
    here = this_process()
    leave_lock(tmp_path, replace(here, started=here.started - 1))
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()


def test_on_another_machine_silence_frees_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_lock(tmp_path, elsewhere())
    lock = quick(tmp_path)
    started = time.monotonic()
    lock.take()
    assert time.monotonic() - started > 0.4
    assert "process 17 on node7" in caplog.text and "taking over" in caplog.text
    lock.release()


def test_long_silence_is_watched_for_two_beats_only(tmp_path: Path) -> None:
    leave_lock(tmp_path, elsewhere(), seconds_ago=3600)
    lock = FolderLock(tmp_path, beat_seconds=0.1, stale_seconds=1800)
    started = time.monotonic()
    lock.take()
    assert 0.2 <= time.monotonic() - started < 10
    lock.release()


def test_on_another_machine_a_sign_of_life_refuses(tmp_path: Path) -> None:
    path = leave_lock(tmp_path, elsewhere(slurm_job="c:5"), seconds_ago=3600)
    beat = threading.Timer(0.1, lambda: os.utime(path))
    beat.start()
    with pytest.raises(FolderInUseError, match=r"process 17 on node7, Slurm job c:5"):
        FolderLock(tmp_path, beat_seconds=0.3, stale_seconds=1800).take()
    beat.join()


def test_a_clock_that_runs_ahead_does_not_hold_it_for_ever(tmp_path: Path) -> None:
    leave_lock(tmp_path, elsewhere(), seconds_ago=-1e6)
    lock = quick(tmp_path)
    lock.take()
    lock.release()


def test_a_lock_that_is_given_back_while_it_is_watched(tmp_path: Path) -> None:
    path = leave_lock(tmp_path, elsewhere())
    threading.Timer(0.1, path.unlink).start()
    lock = FolderLock(tmp_path, beat_seconds=0.05, stale_seconds=1800)
    lock.take()
    lock.release()


def test_the_holder_gives_signs_of_life(tmp_path: Path) -> None:
    lock = quick(tmp_path)
    lock.take()
    os.utime(tmp_path / LOCK_NAME, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK_NAME).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_a_lock_that_somebody_deletes_is_made_again(tmp_path: Path) -> None:
    lock = quick(tmp_path)
    lock.take()
    (tmp_path / LOCK_NAME).unlink()
    deadline = time.monotonic() + 10
    while not (tmp_path / LOCK_NAME).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    assert os.listdir(tmp_path) == []


def test_who_has_lost_it_notices_and_does_not_give_back_what_is_anothers(tmp_path: Path) -> None:
    lock = quick(tmp_path)
    lock.take()
    usurper = elsewhere()
    for _ in range(10):
        leave_lock(tmp_path, usurper)
        time.sleep(0.02)
    beat = threading.Timer(0.1, lambda: leave_lock(tmp_path, usurper))
    beat.start()
    with pytest.raises(FolderInUseError, match="in use by process 17 on node7"):
        FolderLock(tmp_path, beat_seconds=0.2, stale_seconds=1800).take()
    beat.join()
    lock.release()
    assert read_owner((tmp_path / LOCK_NAME).read_bytes()) == usurper


def test_a_requeued_slurm_job_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = elsewhere(slurm_job="cluster:12", slurm_restarts=0)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "cluster")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert is_gone(before, this_process()) is None, "another process of the same job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_gone(before, this_process()) is True
    assert is_gone(replace(before, slurm_job="cluster:13"), this_process()) is None
    leave_lock(tmp_path, before)
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()


def test_two_that_find_a_stale_one_do_not_both_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is faster between this one's judgement and its action."""
    dead = replace(this_process(), started=1)
    path = leave_lock(tmp_path, dead)
    winner = replace(this_process(), pid=os.getppid(), started=_start_of_parent())
    set_aside = lock_module._set_aside

    def be_late(*arguments: object) -> None:
        path.write_bytes(winner.to_json())
        set_aside(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lock_module, "_set_aside", be_late)
    with pytest.raises(FolderInUseError, match=f"process {winner.pid}"):
        FolderLock(tmp_path).take()
    assert read_owner(path.read_bytes()) == winner


def _start_of_parent() -> int:
    stat = Path(f"/proc/{os.getppid()}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


def _nothing(path: Path) -> None:
    path.touch()


def _nonsense(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def _wrong_pid(path: Path) -> None:
    path.write_bytes(replace(elsewhere(), pid=10**30).to_json())


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    (path / "mine").mkdir(parents=True)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_nothing, _nonsense, _wrong_pid, _fifo, _folder, _dangling])
def test_what_names_no_owner_is_stale_after_the_time(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / LOCK_NAME)
    lock = quick(tmp_path)
    lock.take()
    assert os.listdir(tmp_path) == [LOCK_NAME]
    assert read_owner((tmp_path / LOCK_NAME).read_bytes()) is not None
    lock.release()


@pytest.mark.parametrize("name", ["file", "file/below", "dangling", "/proc/nothing/here"])
def test_a_folder_that_cannot_be_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    with pytest.raises(
        UnwritableFolderError, match=r"checkpoint\.save: .* cannot be written: .*Give a folder"
    ):
        FolderLock(tmp_path / name).take()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Owner, "to_json", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(
        DiskFullError, match=f"checkpoint.save: {tmp_path} cannot be written: No space.*Free some"
    ):
        FolderLock(tmp_path).take()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(30, "Read-only file system", str(tmp_path / LOCK_NAME))

    monkeypatch.setattr(lock_module.os, "open", refuse)
    with pytest.raises(UnwritableFolderError, match="cannot be written: Read-only file system"):
        FolderLock(tmp_path).take()


def test_a_token_lives_as_long_as_its_process(other: subprocess.Popen[str], tmp_path: Path) -> None:
    owner = read_owner((tmp_path / LOCK_NAME).read_bytes())
    assert owner is not None
    here = this_process()
    assert is_living_token(owner.token, here)
    assert not is_living_token(here.token, here), "one's own leftovers may go"
    assert not is_living_token(replace(owner, host="node7").token, here), "the lock answers for others"
    assert not is_living_token("x", here)
    other.kill()
    other.wait()
    assert not is_living_token(owner.token, here)

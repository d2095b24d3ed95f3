"""The line that is said once more behind torchrun's."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext import last_word
from megatron_ext.last_word import say_last

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "1",
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append(command))
    return commands


def test_torchrun_is_given_the_line(started: list[list[str]], tmp_path: Path) -> None:
    say_last("error: a line", {**TORCHRUN, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == "error: a line"
    assert abs(int(message["extraInfo"]["timestamp"]) - time.time()) < 60
    assert [command[-1] for command in started] == ["error: a line"]


def test_without_torchrun_or_before_its_last_attempt_nothing_happens(started: list[list[str]]) -> None:
    say_last("a line", {})
    say_last("a line", {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"})
    assert started == []


def test_the_line_comes_when_the_other_process_has_ended() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    command = [sys.executable, "-I", last_word.__file__, str(other.pid), "the last line"]
    speaker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    assert speaker.poll() is None
    assert other.stdin is not None
    other.stdin.close()  # it ends; nobody has asked for its status yet
    _, said = speaker.communicate(timeout=30)
    other.wait()
    assert said == "the last line\n"

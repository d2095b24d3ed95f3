"""The fault campaign in its short form; its verdicts; and that it sees what it is for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lckv.errors import ModelError
from lckv_megatron.commands.faults import KINDS, main
from lckv_megatron.faults.children import in_child
from lckv_megatron.faults.damage import Target, damage_target
from lckv_megatron.faults.malice import Attack, attempt
from lckv_megatron.faults.tally import Tally, Verdict, lines

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.nightly  # kills, damage and readers have tests of their own
@pytest.mark.timeout(900)
def test_the_short_form_finds_nothing() -> None:
    """In a process of its own, which has no threads when it forks."""
    words = [sys.executable, "-W", "ignore", "-m", "tools.faults", "--short"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("kind ")
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {row[0].rstrip(":") for row in rows} == set(KINDS)
    assert all(row[-1] == "0" for row in rows)


def test_kinds_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kinds", "kills,floods"])
    assert "'floods' is not one of kills, damage, malice, requests" in capsys.readouterr().err


def test_a_work_folder_that_is_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").touch()
    assert main(["--work-folder", str(tmp_path)]) == 2
    assert main(["--work-folder", str(tmp_path / "mine")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_child_is_limited_and_its_ending_told() -> None:
    def refuse() -> str:
        raise ModelError("no")

    def fail() -> str:
        raise KeyError("bug")

    def die() -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    assert in_child(lambda: "text").text == "text"
    endings = {
        "refused": in_child(refuse),
        "traceback": in_child(fail),
        "killed": in_child(die),
        "hangs": in_child(lambda: str(time.sleep(60)), seconds=0.3),
    }
    for how, ending in endings.items():
        assert ending.how == how
    assert "KeyError: 'bug'" in endings["traceback"].text
    greedy = in_child(lambda: str(len(bytearray(2**31))), more_bytes=2**28)
    assert greedy.how == "traceback"
    assert "MemoryError" in greedy.text


def _first_line(folder: Path) -> str:
    """A reader that only guards the first byte, and falls over Y."""
    text = (folder / "file").read_bytes()
    if text[:1] != b"x":
        raise ModelError("the first byte is wrong")
    return text[:4].hex()


@pytest.mark.parametrize(
    ("checksums", "kinds"),
    [(False, {"noticed", "harmless", "other value"}), (True, {"noticed", "harmless", "wrong"})],
)
def test_damage_that_is_not_noticed_is_counted(tmp_path: Path, checksums: bool, kinds: set[str]) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "file").write_bytes(b"x" * 16)
    target = Target("file", folder, _first_line, checksums, ("file",))
    tally = damage_target(target, tmp_path, 60, 1, lambda _: None)
    assert tally.tried == 60
    assert {verdict.value for verdict, count in tally.counts.items() if count} == kinds
    assert len(tally.wrongs) == tally.counts[Verdict.WRONG]


def test_malice_that_succeeds_is_counted(tmp_path: Path) -> None:
    folder, canary = tmp_path / "good", tmp_path / "canary"
    folder.mkdir()
    tally = Tally("malice")

    def crash(_: Path) -> str:
        raise RecursionError

    def run(_: Path) -> str:
        canary.mkdir()
        raise ModelError("too late")

    def refuse(_: Path) -> str:
        raise ModelError("no")

    for read in (crash, run, refuse, lambda _: "taken"):
        attempt(Attack("kind", "what", folder, lambda _: None, read), tmp_path, canary, tally)
    assert tally.counts[Verdict.WRONG] == 3
    assert tally.counts[Verdict.NOTICED] == 1
    assert "its code was run" in tally.wrongs[1]
    assert "it was taken for good" in tally.wrongs[2]


def test_the_table() -> None:
    tally = Tally("damage: x")
    tally.add(Verdict.NOTICED, "a", "b")
    tally.add(Verdict.WRONG, "byte 3", "KeyError")
    assert list(lines([tally])) == [
        "kind       tried  noticed  harmless  other value  wrong",
        "damage: x  2      1        0         0            1",
    ]
    assert tally.wrongs == ["damage: x: byte 3: KeyError"]

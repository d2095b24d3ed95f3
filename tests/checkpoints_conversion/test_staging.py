"""A folder is written in full or not at all, whatever ends the program."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.staging import check_free, staged

WRITE_FOR_EVER = """
import sys, time
from pathlib import Path
from checkpoints_conversion.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_the_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with staged(target) as folder:
        (folder / "weights").write_text("x")
        assert not target.exists()
    assert (target / "weights").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "model") as folder:
            (folder / "part").mkdir()
            (folder / "part" / "weights").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_write_is_explained(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "model"):
            raise OSError(28, "No space left on device", "model.safetensors")

    with pytest.raises(
        ConversionError, match=r"model cannot be written: .*No space left on device: 'model\.safetensors'"
    ):
        write()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="cannot be written"), staged(tmp_path / "file" / "model"):
        raise AssertionError("must not start")


def test_a_full_disk(tmp_path: Path) -> None:
    refused = pytest.raises(ConversionError, match=r"takes about 1,000,000,000,067\.1 MB, .* MB are free")
    with refused, staged(tmp_path / "model", needed_bytes=10**18):
        raise AssertionError("must not start")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    with staged(tmp_path) as folder:
        (folder / "weights").write_text("x")
    assert (tmp_path / "weights").exists()


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with (
        pytest.raises(ConversionError, match="is not empty; a conversion writes a new folder"),
        staged(tmp_path),
    ):
        raise AssertionError("must not start")
    with pytest.raises(ConversionError, match="mine is a file"):
        check_free(tmp_path / "mine")


def test_a_folder_that_filled_up_meanwhile_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write() -> None:
        with staged(target) as folder:
            (folder / "ours").write_text("x")
            target.mkdir()
            (target / "theirs").write_text("y")

    with pytest.raises(ConversionError, match="is not empty"):
        write()
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]


def test_only_one_conversion_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged(target) as folder:
        (folder / "weights").write_text("x")
        with pytest.raises(ConversionError, match="another conversion is writing"), staged(target):
            raise AssertionError("must not start")
    assert (target / "weights").exists()


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert not target.exists()
    with staged(target) as folder:
        assert list(folder.iterdir()) == []
        (folder / "weights").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

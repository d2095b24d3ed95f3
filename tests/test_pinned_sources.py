"""Sources that pip brings: what is skipped, what is an error, what is unpacked."""

import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import pinned_sources
from tests.pinned_sources import FLASH_ATTN, TRANSFORMER_ENGINE, folder_of


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_sources, "CACHE", tmp_path / "cache")


def answer(monkeypatch: pytest.MonkeyPatch, returncode: int, said: str, *files: Path) -> None:
    """What pip does from now on."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        for file in files:
            file.rename(folder / file.name)
        return subprocess.CompletedProcess(command, returncode, "", said)

    monkeypatch.setattr(pinned_sources.subprocess, "run", run)


def test_without_a_network_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution\n\n")
    with pytest.raises(
        pytest.skip.Exception, match=r"pip cannot bring x 2\.11\.0: ERROR: No matching distribution"
    ):
        folder_of(replace(TRANSFORMER_ENGINE, name="x"))


def test_another_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    with pytest.raises(AssertionError, match="DO NOT MATCH"):
        folder_of(replace(TRANSFORMER_ENGINE, name="y"))


def test_a_wheel_and_a_source_distribution_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "one-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/__init__.py", "1")
    answer(monkeypatch, 0, "", tmp_path / "one-1-py3-none-any.whl")
    assert (folder_of(replace(TRANSFORMER_ENGINE, name="one")) / "one/__init__.py").read_text() == "1"
    with tarfile.open(tmp_path / "two-1.tar.gz", "w:gz") as sources:
        for name in ("two-1/two/__init__.py", "two-1/csrc/kernel.cu"):
            member = tarfile.TarInfo(name)
            member.size = 1
            sources.addfile(member, io.BytesIO(b"2"))
    answer(monkeypatch, 0, "", tmp_path / "two-1.tar.gz")
    folder = folder_of(replace(FLASH_ATTN, name="two"))
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["__init__.py"]
    assert (folder / "two/__init__.py").read_text() == "2"

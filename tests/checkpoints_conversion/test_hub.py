from pathlib import Path
from typing import Any

import pytest

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.hub import local_folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["nowhere", "./no/folder", "/no/folder", "a/b/c", "../a", "-a/b"])
def test_no_folder_and_no_name(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConversionError, match=r"is not a folder that exists; give one, or a name on the Hugging Face Hub"
    ):
        local_folder(path)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ConversionError, match="is a file; give the folder"):
        local_folder(str(tmp_path / "model.safetensors"))


def test_a_name_without_a_network() -> None:
    with pytest.raises(
        ConversionError,
        match=r"nobody/no-such-model is not a folder .* it cannot be fetched: .*or give a folder",
    ):
        local_folder("nobody/no-such-model")


def test_no_code_and_nothing_pickled_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert local_folder("someone/model") == tmp_path
    assert asked.pop("name") == "someone/model"
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "README.md",
        "LICENSE.txt",
    ]
    unwanted = [
        "pytorch_model.bin",
        "modeling.py",
        "original/consolidated.00.pth",
        "original/params.json",
        "images/plot.png",
    ]
    assert list(filter_repo_objects(wanted + unwanted, **asked)) == wanted

"""Folders of Hugging Face models: shards, indices, pickles, and what can be wrong with them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion.formats.huggingface import write_safetensors
from lckv.errors import ModelError
from lckv.weights.huggingface import HuggingFaceFolder, read_config_file
from lckv.weights.tensors import MemorySource
from tests.lckv.families.tiny_models import saved_model

SOURCE = MemorySource({f"w{index}": torch.full((8, 4), float(index)) for index in range(5)})  # 128 bytes each


def _folder(path: Path, max_shard_bytes: int = 300) -> Path:
    path.mkdir()
    write_safetensors(path, SOURCE, max_shard_bytes=max_shard_bytes)
    return path


def _assert_same(folder: HuggingFaceFolder) -> None:
    assert folder.infos() == SOURCE.infos()
    for name, tensor in SOURCE.tensors.items():
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read(name, slice(2, 3)), tensor[2:3])


@pytest.mark.parametrize(
    ("max_shard_bytes", "files"),
    [(1, 5), (128, 5), (300, 3), (10**9, 1)],
)
def test_shards(max_shard_bytes: int, files: int, tmp_path: Path) -> None:
    folder = HuggingFaceFolder(_folder(tmp_path / "m", max_shard_bytes))
    _assert_same(folder)
    assert len(folder.files) == files
    expected = {f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)}
    expected = {"model.safetensors"} if files == 1 else expected | {"model.safetensors.index.json"}
    assert set(os.listdir(folder.path)) == expected
    assert str(folder) == str(tmp_path / "m")
    if files > 1:
        index = json.loads((folder.path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 5 * 128}
        assert set(index["weight_map"]) == set(SOURCE.tensors)


def test_shards_of_transformers(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m", "llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    one, many = HuggingFaceFolder(tmp_path / "m"), HuggingFaceFolder(tmp_path / "shards")
    assert len(one.files) == 1 < len(many.files)
    assert dict(one.infos()) == dict(many.infos())
    for name, parameter in model.named_parameters():
        assert torch.equal(one.read(name), parameter)
        assert torch.equal(many.read(name), parameter)
    assert read_config_file(tmp_path / "m") == json.loads((tmp_path / "m" / "config.json").read_text())


def _truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _edit_index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def _break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"model-00002-of-00003.safetensors is truncated"),
        (
            _remove_shard,
            r"model-00002-of-00003.safetensors is missing, but model.safetensors.index.json names it",
        ),
        (_break_index, r"model.safetensors.index.json is not valid JSON"),
        (
            _edit_index(lambda index: index["weight_map"].update(w9="model-00001-of-00003.safetensors")),
            (
                r"model-00001-of-00003.safetensors lacks 1 tensors that model.safetensors.index.json says it "
                r"has, such as w9"
            ),
        ),
        (
            _edit_index(lambda index: index["weight_map"].update(w0="model-00002-of-00003.safetensors")),
            r"model-00002-of-00003.safetensors lacks 1 tensors .*, such as w0",
        ),
        (
            _edit_index(lambda index: index["weight_map"].update(w9="../secret")),
            r"w9 is in '../secret'; only files of the same",
        ),
        (
            _edit_index(lambda index: index.update(weight_map={})),
            r"weight_map is {}; it must say for every tensor",
        ),
        (_edit_index(lambda index: index.update(weight_map={"w0": 3})), r"weight_map is {'w0': 3}"),
    ],
)  # fmt: skip
def test_damaged_folders(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        HuggingFaceFolder(folder)


def test_tensors_that_the_index_does_not_name_are_seen(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m")
    _edit_index(lambda index: index["weight_map"].pop("w1"))(folder)
    assert "w1" in HuggingFaceFolder(folder).infos()


def test_the_index_decides_between_two_tensors_of_one_name(tmp_path: Path) -> None:
    for first, second in (("a", "b"), ("b", "a")):
        folder = tmp_path / f"{first}{second}"
        folder.mkdir()
        for name, value in (("a", 1.0), ("b", 2.0)):
            source = MemorySource({"w": torch.full((2,), value), f"only_{name}": torch.zeros(1)})
            write_safetensors(folder, source)
            (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
        index = {"only_a": "a.safetensors", "only_b": "b.safetensors", "w": f"{first}.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert HuggingFaceFolder(folder).read("w")[0] == {"a": 1.0, "b": 2.0}[first]


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        HuggingFaceFolder(tmp_path)
    with pytest.raises(ModelError, match="nowhere is not a folder; give that of a model"):
        HuggingFaceFolder(tmp_path / "nowhere")


def _pickled(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    folder = _pickled(tmp_path / "m", dict(SOURCE.tensors))
    message = (
        r"has no model.safetensors, only pickled weights \(pytorch_model.bin\). Pickles can run programs: "
        r".*--allow-pickle"
    )
    with pytest.raises(ModelError, match=message):
        HuggingFaceFolder(folder)
    opened = HuggingFaceFolder(folder, allow_pickle=True)
    _assert_same(opened)
    opened.read("w1").zero_()  # a copy of what is mapped
    opened.read("w1", slice(0, 2)).zero_()
    _assert_same(opened)


def test_pickled_shards(tmp_path: Path) -> None:
    names = list(SOURCE.tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:2], "pytorch_model-00002-of-00002.bin": names[2:]}
    for file, held in shards.items():
        torch.save({name: SOURCE.tensors[name] for name in held}, tmp_path / file)
    index = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    _assert_same(HuggingFaceFolder(tmp_path, allow_pickle=True))


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    folder = _pickled(_folder(tmp_path / "m"), {"other": torch.zeros(1)})
    _assert_same(HuggingFaceFolder(folder, allow_pickle=True))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("content", [{"w": _Bomb()}, [torch.zeros(1)], {"w": 3}])
def test_pickles_of_anything_but_tensors(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = _pickled(tmp_path / "m", content)
    with pytest.raises(ModelError, match=r"holds more than tensors|holds no dictionary of tensors"):
        HuggingFaceFolder(folder, allow_pickle=True)
    assert not (tmp_path / "unpickled").exists()


def test_damaged_pickles(tmp_path: Path) -> None:
    path = _pickled(tmp_path / "m", dict(SOURCE.tensors)) / "pytorch_model.bin"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"404: not found"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"pytorch_model.bin is truncated, holds more than tensors"):
            HuggingFaceFolder(path.parent, allow_pickle=True)
    torch.save(dict(SOURCE.tensors), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"is older than PyTorch 1.6"):
        HuggingFaceFolder(path.parent, allow_pickle=True)


def test_config_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json cannot be read: No such file or directory"):
        read_config_file(tmp_path)
    (tmp_path / "config.json").write_text("{'a'")
    with pytest.raises(ModelError, match=r"config.json is not valid JSON"):
        read_config_file(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config.json holds list; it must be a JSON object"):
        read_config_file(tmp_path)

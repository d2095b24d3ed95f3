"""Files beside the weights that are damaged, or no files: an error by name, whatever a library says."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lckv.errors import ModelError
from lckv.generation.loading import load_model, load_tokenizer
from lckv.tokenizer_files import JSON_NAMES, check_folder
from tests.lckv.serving.served_model import write_folder

DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("good") / "model")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize(
    "content", [DEEP, b'{"a":' * 50_000, b"{", b"[3]", b"\xff\xfe", b"", b'{"a": ' + b"9" * 9999]
)
@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "tokenizer_config.json", "generation_config.json"]
)
def test_json_that_is_none(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": 3}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("special_tokens_map.json", {"eos_token": {"__type": "AddedToken", "x": 1}}),
        ("generation_config.json", {"max_new_tokens": "many", "cache_implementation": 3}),
        ("generation_config.json", {"bos_token_id": [[]], "compile_config": 3}),
    ],
)
def test_json_of_other_values(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))
    said = ""
    try:
        load_model(folder, device="cpu")  # some values mean nothing to the library
    except ModelError as error:
        said = str(error)
    assert not said or str(folder) in said


@pytest.mark.parametrize("name", JSON_NAMES)
def test_what_is_no_file(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for action in (check_folder, load_tokenizer, load_model):
        with pytest.raises(ModelError, match=rf"{name} is a FIFO; it must be a file"):
            action(folder)


def test_a_file_of_a_terabyte(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 2**40)
    with pytest.raises(ModelError, match=r"tokenizer\.json has 1,099,511,627,776 bytes"):
        load_tokenizer(folder)


def test_a_model_of_sentencepiece_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_folder_of_the_hubs_cache(good: Path, tmp_path: Path) -> None:
    """Its files are links into another folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in good.iterdir():
        shutil.copy(path, tmp_path / "blobs" / path.name)
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    _, tokenizer = load_model(tmp_path / "snapshot", device="cpu")
    assert tokenizer is not None

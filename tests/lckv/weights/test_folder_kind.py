"""The kind of model at a path, and the way from one kind to another."""

from pathlib import Path

import pytest

from lckv.weights.folder_kind import Kind, explain_other_kind, kind_of

FILES: dict[str, tuple[Kind | None, list[str]]] = {
    "hugging face": ("huggingface", ["config.json", "model.safetensors"]),
    "ours": ("megatron", ["latest", "iter_0000100/manifest.json", "iter_0000100/config.json"]),
    "one of ours": ("megatron", ["manifest.json", "config.json", ".metadata"]),
    "one of ours, damaged": ("megatron", ["config.json", ".metadata", "common.pt"]),
    "ours, damaged": ("megatron", ["iter_0000100/config.json"]),
    "older layout": (
        "megatron-legacy",
        ["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"],
    ),
    "older layout, one": ("megatron-legacy", ["mp_rank_00_001/model_optim_rng.pt"]),
    "Megatron-LM's": ("megatron-core", ["latest_checkpointed_iteration.txt", "iter_0000100/.metadata"]),
    "empty": (None, []),
    "other": (None, ["notes.txt"]),
}


def make(folder: Path, files: list[str]) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_folder_is_known_by_its_files(name: str, tmp_path: Path) -> None:
    kind, files = FILES[name]
    assert kind_of(make(tmp_path / "folder", files)) == kind


def test_one_iteration_of_megatron_lm(tmp_path: Path) -> None:
    make(tmp_path / "folder", FILES["Megatron-LM's"][1])
    assert kind_of(tmp_path / "folder" / "iter_0000100") == "megatron-core"


def test_files_and_what_is_not_there(tmp_path: Path) -> None:
    make(tmp_path / "folder", ["model.gguf", "model.safetensors"])
    assert kind_of(tmp_path / "folder" / "model.gguf") == "gguf"
    assert kind_of(tmp_path / "folder" / "model.safetensors") is None
    assert kind_of(tmp_path / "absent.gguf") is None


@pytest.mark.parametrize(
    ("name", "wanted", "commands"),
    [
        ("hugging face", "megatron", ["convert hf-to-megatron --hf-path PATH --megatron-path NEW"]),
        ("ours", "huggingface", ["convert megatron-to-hf --megatron-path PATH --hf-path NEW"]),
        ("older layout", "megatron", ["convert legacy-to-megatron --legacy-path PATH --megatron-path NEW"]),
        (
            "older layout",
            "huggingface",
            [
                "convert legacy-to-megatron --legacy-path PATH --megatron-path NEW",
                "convert megatron-to-hf --megatron-path NEW --hf-path NEW2",
            ],
        ),
        ("Megatron-LM's", "megatron", ["convert hf-to-megatron --hf-path EXPORTED --megatron-path NEW"]),
    ],
)
def test_the_way_is_told(name: str, wanted: Kind, commands: list[str], tmp_path: Path) -> None:
    path = make(tmp_path / "folder", FILES[name][1])
    said = explain_other_kind(path, wanted) or ""
    assert said.startswith(f"{path} is ")
    told = [part.strip() for part in said.replace(", then ", "\n").split("lckv-megatron ")[1:]]
    assert told == [command.replace("PATH", str(path)) for command in commands]


def test_the_way_from_a_file(tmp_path: Path) -> None:
    path = make(tmp_path / "folder", ["model.gguf"]) / "model.gguf"
    said = explain_other_kind(path, "megatron") or ""
    assert (
        f"lckv-megatron gguf-to-hf {path} NEW, then lckv-megatron convert hf-to-megatron --hf-path NEW "
        in said
    )


@pytest.mark.parametrize("name", ["empty", "other", "ours"])
def test_there_is_nothing_to_say_of_the_kind_itself_and_of_what_is_not_known(
    name: str, tmp_path: Path
) -> None:
    assert explain_other_kind(make(tmp_path / "folder", FILES[name][1]), "megatron") is None

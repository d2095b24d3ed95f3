"""Models of another format than the one that is wanted: the message names the converter."""

import shlex
from pathlib import Path

import pytest

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.hub import local_folder
from checkpoints_conversion.opening import format_of, open_huggingface, open_legacy, open_megatron
from checkpoints_conversion.options import build_parser
from lckv.weights.folder_kind import Kind, explain_other_kind
from megatron_ext.checkpointing.errors import CheckpointError

FILES = {
    "huggingface": "config.json",
    "megatron": "iter_0000100/manifest.json",
    "megatron-legacy": "mp_rank_00/model_optim_rng.pt",
    "megatron-core": "latest_checkpointed_iteration.txt",
}
OPENERS = {"huggingface": open_huggingface, "megatron": open_megatron, "megatron-legacy": open_legacy}


def make(folder: Path, kind: str) -> Path:
    path = folder / FILES[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return folder


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("wanted", OPENERS)
def test_what_is_of_another_format_is_named(kind: str, wanted: str, tmp_path: Path) -> None:
    if kind == wanted:
        return
    with pytest.raises((ConversionError, CheckpointError), match=f"{tmp_path} is a .*, not a "):
        OPENERS[wanted](make(tmp_path, kind))


def test_formats(tmp_path: Path) -> None:
    for kind in OPENERS:
        assert format_of(make(tmp_path / kind, kind)) == kind
    with pytest.raises(ConversionError, match=r"of Megatron-LM's own program, .* Export it"):
        format_of(make(tmp_path / "core", "megatron-core"))
    with pytest.raises(ConversionError, match="holds no model"):
        format_of(tmp_path / "none")


def test_a_file_names_its_converter(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConversionError, match=r"a GGUF file.*lckv-megatron gguf-to-hf .*model\.gguf NEW"):
        local_folder(str(tmp_path / "model.gguf"))
    with pytest.raises(ConversionError, match="is a file; give the folder of the model"):
        local_folder(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("kind", ["huggingface", "megatron", "megatron-legacy"])
@pytest.mark.parametrize("wanted", ["huggingface", "megatron"])
def test_the_commands_that_are_named_exist(kind: Kind, wanted: Kind, tmp_path: Path) -> None:
    said = explain_other_kind(make(tmp_path, kind), wanted) or ""
    commands = said.replace(", then ", "\n").split("lckv-megatron convert ")[1:]
    assert bool(commands) == (kind != wanted)
    for command in commands:
        build_parser("convert").parse_args(shlex.split(command))

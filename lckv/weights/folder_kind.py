"""What kind of model a path holds, as far as names of files tell, and the program that makes another kind.

No file is opened, and torch is not loaded: programs say what is wrong with a path before they load anything.
"""

from pathlib import Path
from typing import Literal

from lckv.errors import ModelError

Kind = Literal["huggingface", "megatron", "megatron-legacy", "megatron-core", "gguf"]
"""Of folders but for gguf: Hugging Face's format; this project's checkpoints, one or a directory of them;
Megatron's older layout; what Megatron-LM saves now; a GGUF file."""

_CONFIG = "config.json"
_MANIFEST = "manifest.json"
_RANK = "mp_rank_*"
_ITERATION = "iter_*"
_TRACKER = "latest_checkpointed_iteration.txt"

_CALLED: dict[Kind, str] = {
    "huggingface": "a model in Hugging Face's format",
    "megatron": "a folder of this project's checkpoints",
    "megatron-legacy": "a checkpoint in Megatron's older layout",
    "megatron-core": "a checkpoint of Megatron-LM's own program",
    "gguf": "a GGUF file",
}
_TO_MEGATRON = "lckv-megatron convert hf-to-megatron --hf-path {0} --megatron-path {1}"
_TO_HUGGINGFACE = "lckv-megatron convert megatron-to-hf --megatron-path {0} --hf-path {1}"
_LEGACY_TO_MEGATRON = "lckv-megatron convert legacy-to-megatron --legacy-path {0} --megatron-path {1}"
_GGUF_TO_HUGGINGFACE = "lckv-megatron gguf-to-hf {0} {1}"
_PROGRAMS: dict[tuple[Kind, Kind], tuple[str, ...]] = {
    ("huggingface", "megatron"): (_TO_MEGATRON,),
    ("megatron-legacy", "megatron"): (_LEGACY_TO_MEGATRON,),
    ("gguf", "megatron"): (_GGUF_TO_HUGGINGFACE, _TO_MEGATRON),
    ("megatron", "huggingface"): (_TO_HUGGINGFACE,),
    ("megatron-legacy", "huggingface"): (_LEGACY_TO_MEGATRON, _TO_HUGGINGFACE),
    ("gguf", "huggingface"): (_GGUF_TO_HUGGINGFACE,),
}
"""What makes the second kind of the first, one after the other."""


def kind_of(path: Path) -> Kind | None:
    """What lies at `path`; None where it is none of these."""
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    if not path.is_dir():
        return None
    if _any(path, _MANIFEST, f"{_ITERATION}/{_MANIFEST}"):
        return "megatron"
    if _any(path, _RANK, f"*/{_RANK}"):
        return "megatron-legacy"
    if (path / _TRACKER).exists() or (path.match(_ITERATION) and (path.parent / _TRACKER).exists()):
        return "megatron-core"
    if _any(path, _ITERATION, ".metadata"):
        return "megatron"
    return "huggingface" if (path / _CONFIG).exists() else None


def explain_other_kind(path: Path, wanted: Kind) -> str | None:
    """That `path` holds another kind of model than `wanted`, and what to do; None where it does not."""
    kind = kind_of(path)
    if kind is None or kind == wanted:
        return None
    said = f"{path} is {_CALLED[kind]}, not {_CALLED[wanted]}"
    if kind == "megatron-core":
        return (
            f"{said}, and nothing here reads it. Export it to Hugging Face's format with Megatron-LM or "
            f"Megatron Bridge, then: {_TO_MEGATRON.format('EXPORTED', 'NEW')}"
        )
    programs = _PROGRAMS.get((kind, wanted))
    if programs is None:
        return said
    places = [str(path), *("NEW", "NEW2")[: len(programs)]]
    commands = [
        program.format(source, target)
        for program, source, target in zip(programs, places[:-1], places[1:], strict=True)
    ]
    return f"{said}. Convert it, into new folders: {', then '.join(commands)}"


def require_huggingface(folder: Path) -> None:
    """Raises ModelError where `folder` holds a model of another kind, with the program that converts it, and
    FileNotFoundError where it has no config.json."""
    if other := explain_other_kind(folder, "huggingface"):
        raise ModelError(f"{other}.")
    if not (folder / _CONFIG).exists():
        raise FileNotFoundError(
            f"{folder}/{_CONFIG} does not exist; give the folder of a model in Hugging Face's format."
        )


def _any(path: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern))

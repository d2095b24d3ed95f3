"""What is wrong with the places that conversions read and write, said before torch or Megatron is loaded."""

from pathlib import Path

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.hub import local_folder
from checkpoints_conversion.staging import check_free
from lckv.weights.folder_kind import explain_other_kind
from megatron_ext.checkpointing.folders import find_candidates

NO_TOKENIZER = Path("none")
"""Given as the tokenizer of an export: there shall be none."""


def check_huggingface(path: str) -> Path:
    """The folder of a Hugging Face model, fetched from the Hub if need be. Raises ConversionError where there
    is none, or it holds a model of another kind."""
    folder = local_folder(path)
    if other := explain_other_kind(folder, "huggingface"):
        raise ConversionError(f"{other}.")
    return folder


def check_export(megatron: Path, target: Path, tokenizer: Path | None) -> None:
    """The places of a conversion to Hugging Face's format. Raises ConversionError, or CheckpointError where
    there is no checkpoint."""
    check_free(target)
    if tokenizer != NO_TOKENIZER:
        _check_tokenizer(tokenizer)
    find_candidates(megatron)


def check_legacy(legacy: Path, target: Path, tokenizer: Path | None) -> None:
    """The places of a conversion from Megatron's older layout. Raises ConversionError."""
    check_free(target)
    _check_tokenizer(tokenizer)
    if other := explain_other_kind(legacy, "megatron-legacy"):
        raise ConversionError(f"{other}.")
    if not legacy.exists():
        raise ConversionError(f"{legacy} does not exist; give the folder of a checkpoint.")


def _check_tokenizer(path: Path | None) -> None:
    if path is not None and not path.exists():
        raise ConversionError(
            f"--tokenizer {path} does not exist; give the folder or file of the model's tokenizer."
        )

"""A model by the name of its folder, or by its name on the Hugging Face Hub."""

import re
from pathlib import Path

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.source_card import CARD_NAME, LICENSE_FILES
from lckv.weights.folder_kind import explain_other_kind

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = [
    "*.json", "*.safetensors", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt",
    "chat_template*", "additional_chat_templates/*", CARD_NAME, *LICENSE_FILES,
]  # fmt: skip
"""Weights in safetensors, configurations, tokenizers, the page and the license; no code, nothing pickled."""


def local_folder(path: str) -> Path:
    """The folder `path`, or the one that holds a copy of the Hub's model of this name, fetched if need be.

    Raises ConversionError where it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        other = explain_other_kind(folder, "huggingface")
        raise ConversionError(f"{other or f'{path} is a file; give the folder of the model'}.")
    if not _HUB_NAME.fullmatch(path):
        raise ConversionError(
            f"{path} is not a folder that exists; give one, or a name on the Hugging Face Hub such as "
            "meta-llama/Llama-2-7b-hf."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(path, allow_patterns=_WANTED, ignore_patterns=["original/*", "consolidated*"])
        )
    except (
        OSError,
        ValueError,
    ) as error:  # no network, no such model, no permission: all of these are OSErrors
        raise ConversionError(
            f"{path} is not a folder that exists, and as a name on the Hugging Face Hub it cannot be "
            f"fetched: {error} Check the name, the network, and for gated models `hf auth login`; or give "
            "a folder."
        ) from error

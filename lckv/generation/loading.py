"""Models and tokenizers from Hugging Face folders, of every family that `lckv.families` declares.

Each becomes an `LCKVLlamaForCausalLM`. In a plain model all layers read their own keys and values; the
weights have the same names.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lckv.errors import ModelError
from lckv.families.registry import describe, family_of
from lckv.generation.sentencepiece_conversion import use_own_splitting
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.tokenizer_files import MODEL_NAME, check_folder, is_only_sentencepiece
from lckv.weights.checks import CheckedSource
from lckv.weights.folder_kind import require_huggingface
from lckv.weights.huggingface import CONFIG_NAME, HuggingFaceFolder, read_config_file
from lckv.weights.tensors import TensorSource, row_chunks

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
    "tekken.json",
)
_GENERATION_NAME = "generation_config.json"


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LCKVLlamaForCausalLM, PreTrainedTokenizerBase | None]:
    """The model of a folder, in evaluation mode, and its tokenizer, None where the folder has none.

    `dtype`: default that of most of the weights. `device`: default a GPU where there is one. Weights are read
    in slices of rows, straight to the device.

    Raises FileNotFoundError for a folder without config.json, and ModelError for models that would not be
    computed right: of another kind, with fields that have no meaning here, with weights that are missing,
    superfluous, pickled or not finite; and for what another program made, with the converter.
    """
    folder = Path(path)
    require_huggingface(folder)
    check_folder(folder)
    weights = HuggingFaceFolder(folder)
    decoder = describe(read_config_file(folder), weights.infos(), folder / CONFIG_NAME)
    family_of(decoder.family).check_weights(weights, decoder, folder)
    with torch.device("meta"):
        model: Any = LCKVLlamaForCausalLM(LCKVLlamaConfig.from_decoder(decoder))
    model.to(dtype or decoder.dtype).to_empty(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    model.tie_weights()
    _fill(model, CheckedSource(weights, folder))
    if (folder / _GENERATION_NAME).is_file():
        model.generation_config = _generation_config(folder)
    return model.eval(), load_tokenizer(folder)


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: fields are checked where they are used
        raise ModelError(
            f"{folder / _GENERATION_NAME} cannot be understood: {_first_line(error)}."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


@torch.no_grad()
def _fill(model: LCKVLlamaForCausalLM, source: TensorSource) -> None:
    """Copies every parameter from the tensor of its name."""
    infos = source.infos()
    for name, parameter in model.named_parameters():
        for rows in row_chunks(infos[name]):
            parameter[rows].copy_(source.read(name, rows))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, None where it has none. A SentencePiece model splits text as its file says.

    Raises ModelError where a file cannot be read, or that splitting cannot be had.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: what reads the files differs from one class to the next
        raise ModelError(
            f"{folder}: its tokenizer cannot be read: {_first_line(error)}. It is broken, or newer than "
            f"transformers {transformers.__version__} here."
        ) from error
    if is_only_sentencepiece(folder):
        use_own_splitting(tokenizer, folder / MODEL_NAME)
    return tokenizer


def model_config(folder: Path) -> LCKVLlamaConfig:
    """What the config.json of a folder means here; weights are not looked at.

    Raises FileNotFoundError for a folder without config.json, and ModelError with every field that means
    nothing here, and for folders of another format.
    """
    require_huggingface(folder)
    return LCKVLlamaConfig.from_decoder(describe(read_config_file(folder), {}, folder / CONFIG_NAME))

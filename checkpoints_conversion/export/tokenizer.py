"""Tokenizer files beside exported weights: those of the source, or made from the vocabulary that a run was
trained with.

SentencePiece and tiktoken vocabularies become a tokenizer.json that transformers reads. The result is tried
on a few texts before it is accepted, for transformers does not always give the ids that the model was trained
on: it ignores the scores of a SentencePiece file, and replaces the tokenizer
of some types of models by another one.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from checkpoints_conversion.errors import ConversionError
from lckv.generation.loading import load_tokenizer as load_folder
from lckv.generation.sentencepiece_conversion import convert
from lckv.tokenizer_files import PROBES, is_only_sentencepiece, is_tiktoken
from lckv.weights.json_file import read_json_object
from megatron_ext.atomic import write_file
from megatron_ext.data.tiktoken_files import TIKTOKEN_PATTERN
from megatron_ext.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a tokenizer consists of in a Hugging Face folder; no folder has all of them."""
_MORE_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates that have a name."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that can be copied."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def write_tokenizer(kind: str, path: Path, folder: Path) -> list[str]:
    """Write the tokenizer that `megatron_ext.data.tokenizers.load_tokenizer(kind, path)` loads as files that
    transformers reads.

    A folder's files are copied as they are; to tokenizer.model alone a tokenizer.json is added that splits as
    that file does. Returns the names of the files. Raises ConfigError where the
    tokenizer cannot be loaded, and ConversionError where transformers would make something else of it in
    `folder`, whose config.json is there already.
    """
    if kind == "huggingface" and path.is_dir():
        templates = (f"{_MORE_TEMPLATES}/{file.name}" for file in (path / _MORE_TEMPLATES).glob("*.jinja"))
        names = [name for name in (*TOKENIZER_FILES, *sorted(templates)) if (path / name).is_file()]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path / name, folder / name)
        try:
            original = load_tokenizer(kind, str(path))
        except ConfigError as error:
            logger.warning("the tokenizer is copied as it is, and was not tried: %s", error)
            return names
        if is_only_sentencepiece(path):
            names += _add_tokenizer_json(path, folder)
    else:
        original = load_tokenizer(kind, str(path))
        names = _make(kind, path, original, folder)
    _check_agreement(original, path, folder)
    return names


def _make(kind: str, path: Path, original: Tokenizer, folder: Path) -> list[str]:
    if kind == "huggingface":
        content, named = path.read_bytes(), {"eos_token": original.decode([original.eod])}
    else:
        try:
            tokenizer, named = convert(path) if kind == "sentencepiece" else _from_tiktoken(path, original)
        except ValueError as error:
            raise ConversionError(str(error)) from error
        content = tokenizer.to_str(pretty=True).encode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    write_file(folder / "tokenizer.json", content)
    write_file(folder / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False).encode())
    return ["tokenizer.json", "tokenizer_config.json"]


def _add_tokenizer_json(source: Path, folder: Path) -> list[str]:
    """What transformers needs to split as the SentencePiece model in `source` does. Returns new names."""
    try:
        tokenizer: Any = load_folder(source)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    settings = folder / "tokenizer_config.json"
    is_new = not settings.exists()
    config = {} if is_new else read_json_object(settings)
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    config = {
        "clean_up_tokenization_spaces": False,
        **named,
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_file(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    write_file(settings, json.dumps(config, indent=1, ensure_ascii=False).encode())
    return ["tokenizer.json", *(["tokenizer_config.json"] if is_new else [])]


def kind_of(path: Path) -> str:
    """The kind of tokenizer, as in the setting data.tokenizer_type, that a file or folder holds."""
    if path.is_dir() or path.suffix == ".json":
        return "huggingface"
    return "tiktoken" if is_tiktoken(path) else "sentencepiece"


def _check_agreement(original: Tokenizer, source: Path, folder: Path) -> None:
    tokenizer = load_tokenizer("huggingface", str(folder))
    for text in PROBES:
        expected, exported = original.encode(text), tokenizer.encode(text)
        if expected != exported:
            raise ConversionError(
                f"the tokenizer {source} gives {expected} for {text!r}, but exported, transformers makes "
                f"{exported} of it: for models of some types it takes a tokenizer class of its own. Export "
                "under another --family, such as lckv-llama."
            )


def _from_tiktoken(path: Path, original: Tokenizer) -> tuple[Any, dict[str, str]]:
    """As `convert`."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    special = [original.decode([index]) for index in range(ranks, original.vocab_size)]
    tokenizer = TikTokenConverter(str(path), TIKTOKEN_PATTERN, extra_special_tokens=special).converted()
    return tokenizer, {"bos_token": special[0], "eos_token": original.decode([original.eod])}

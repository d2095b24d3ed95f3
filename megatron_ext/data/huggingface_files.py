"""Hugging Face tokenizers: folders as saved by `save_pretrained`, and bare tokenizer.json files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lckv.tokenizer_files import MODEL_NAME, is_only_sentencepiece
from megatron_ext.data.sentencepiece_files import json_object, load_sentencepiece_folder
from megatron_ext.data.tiktoken_files import load_tiktoken
from megatron_ext.data.vocabulary import LoadedTokenizer, named_eod, wrong_kind
from megatron_ext.errors import ConfigError


def load_huggingface(path: Path) -> LoadedTokenizer:
    """See `tokenizers.load_tokenizer`."""
    if not path.is_dir():
        return _load_tokenizer_json(path)
    if (path / "tokenizer.json").exists():
        has_settings = (path / "tokenizer_config.json").exists()
        return _load_folder(path) if has_settings else _load_tokenizer_json(path / "tokenizer.json")
    if is_only_sentencepiece(path):
        return load_sentencepiece_folder(path)
    if (path / MODEL_NAME).is_file():
        return load_tiktoken(path / MODEL_NAME)
    return _load_folder(path)


def _unreadable(path: Path, error: Exception) -> ConfigError:
    import tokenizers

    reason = str(error).split("\n", 1)[0] or type(error).__name__
    return wrong_kind(
        path, "huggingface", f"{reason}; broken, or newer than tokenizers {tokenizers.__version__} here"
    )


def _load_folder(path: Path) -> LoadedTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any kind: what reads the files differs from one class to the next
        raise _unreadable(path, error) from error
    tokenizer.model_max_length = 2**62  # documents are of any length; without this each long one is warned of
    vocabulary = tokenizer.get_vocab()
    _check_vocabulary(path, vocabulary, tokenizer.added_tokens_decoder)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    eod = tokenizer.eos_token_id
    return LoadedTokenizer(
        {index: piece for piece, index in vocabulary.items()},
        named_eod(vocabulary, path) if eod is None else eod,
        encode,
        decode,
    )


def _load_tokenizer_json(path: Path) -> LoadedTokenizer:
    import tokenizers

    try:
        tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(path, error) from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    _check_vocabulary(path, vocabulary, tokenizer.get_added_tokens_decoder())

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    pieces = {index: piece for piece, index in vocabulary.items()}
    return LoadedTokenizer(pieces, _eod_beside(path, vocabulary), encode, decode)


def _check_vocabulary(path: Path, vocabulary: Mapping[str, int], added: Mapping[int, object]) -> None:
    """transformers makes a tokenizer of added tokens alone where a folder lacks the file with the others."""
    if {*vocabulary.values()} <= added.keys():
        raise wrong_kind(path, "huggingface", "it has no file with a vocabulary, or an empty one")


def _eod_beside(path: Path, vocabulary: Mapping[str, int]) -> int:
    """The eos_token of a special_tokens_map.json in the same directory, else a token with a usual name."""
    token = json_object(path.with_name("special_tokens_map.json")).get("eos_token")
    name = str(token.get("content") if isinstance(token, dict) else token)
    return vocabulary[name] if name in vocabulary else named_eod(vocabulary, path)

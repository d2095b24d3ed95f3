"""Tokenizers behind one small interface: Hugging Face, SentencePiece and tiktoken vocabularies, from local
files only.

None of them ever maps text to a control token: a document that contains the characters of an end-of-document
token does not end there. Programs append `eod` themselves.
"""

import hashlib
from pathlib import Path
from typing import Protocol

from megatron_ext.data.huggingface_files import load_huggingface
from megatron_ext.data.sentencepiece_files import load_sentencepiece
from megatron_ext.data.tiktoken_files import load_tiktoken
from megatron_ext.data.vocabulary import KINDS
from megatron_ext.errors import ConfigError

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json",
)  # fmt: skip
"""What a tokenizer in a folder consists of, as far as it bears on ids."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """True number of tokens: the largest id plus one, without padding."""

    @property
    def eod(self) -> int:
        """Id of the token that ends a document."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the mapping from ids to tokens."""

    @property
    def splitting(self) -> str:
        """16 hexadecimal digits that tell how `lckv.tokenizer_files.PROBES` are split: two tokenizers may
        have the same tokens and use them otherwise."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any added begin or end token."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, control tokens included where the vocabulary gives them a name."""


def load_tokenizer(kind: str, path: str | None) -> Tokenizer:
    """Load a tokenizer from local files; nothing is downloaded.

    `kind` is one of:
      huggingface    a directory as saved by `save_pretrained`, or a bare tokenizer.json. A directory with
                     tokenizer.model and no tokenizer.json is read as that file
      sentencepiece  a .model file
      tiktoken       a file of "base64-token rank" lines, such as Llama 3's tokenizer.model. Text is split by
                     `TIKTOKEN_PATTERN`; Llama 3's 256 special tokens take the ids after the last rank, which
                     is where Llama 3 has them; documents end with <|end_of_text|>

    Raises ConfigError if the path is missing, is of another kind, or defines no end-of-document token.
    """
    loaders = {
        "huggingface": load_huggingface,
        "sentencepiece": load_sentencepiece,
        "tiktoken": load_tiktoken,
    }
    if kind not in loaders:
        raise ConfigError(f"tokenizer_type={kind!r} is unknown; use one of {', '.join(KINDS)}.")
    if path is None:
        raise ConfigError(
            f"tokenizer_type={kind!r} needs tokenizer_model, the tokenizer's file or directory."
        )
    location = Path(path)
    if not location.exists():
        raise ConfigError(f"tokenizer_model={path!r} does not exist; give the tokenizer's file or directory.")
    if kind != "huggingface" and location.is_dir():
        raise ConfigError(
            f"tokenizer_model={path!r} is a directory, but tokenizer_type={kind!r} needs the file in it."
        )
    return loaders[kind](location)


def content_of(path: str) -> str:
    """Hash of the files of a tokenizer, 32 hexadecimal digits: it changes with any of them."""
    location = Path(path)
    folder = location if location.is_dir() else location.parent
    names = _FILES if location.is_dir() else (location.name, "special_tokens_map.json")
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()

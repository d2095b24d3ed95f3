"""What loaded tokenizers have in common: a vocabulary, its identity, and errors for what is no tokenizer."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

from lckv.tokenizer_files import PROBES
from megatron_ext.errors import ConfigError

KINDS = ("huggingface", "sentencepiece", "tiktoken")

EOD_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<eod>", "<|eod|>")
"""End-of-document tokens to look for, in this order, in a vocabulary that does not say which one it uses."""


class LoadedTokenizer:
    """A tokenizer made of a vocabulary and of two functions of a library."""

    def __init__(
        self,
        pieces: Mapping[int, str] | Mapping[int, str | bytes],
        eod: int,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.vocab_size = max(pieces) + 1
        self.eod = eod
        self.fingerprint = _fingerprint([*pieces.items()])
        self.encode = encode
        self.decode = decode

    @cached_property
    def splitting(self) -> str:
        """`Tokenizer.splitting`."""
        return hashlib.sha256(repr([self.encode(text) for text in PROBES]).encode()).hexdigest()[:16]


def _fingerprint(pieces: Iterable[tuple[int, str | bytes]]) -> str:
    digest = hashlib.sha256()
    for index, piece in sorted(pieces, key=lambda item: item[0]):
        data = piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
        digest.update(b"%d %d " % (index, len(data)) + data)
    return digest.hexdigest()[:16]


def named_eod(vocabulary: Mapping[str, int], path: Path) -> int:
    """The first of `EOD_NAMES` in the vocabulary of the tokenizer at `path`.

    Raises ConfigError if it has none.
    """
    for name in EOD_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise ConfigError(
        f"tokenizer_model='{path}' names no end-of-document token, and its vocabulary has none of "
        f"{', '.join(EOD_NAMES)}. Add one of them."
    )


def wrong_kind(path: Path, kind: str, reason: object) -> ConfigError:
    """The error for a file or folder that is not of the kind that it should be, or damaged."""
    return ConfigError(
        f"tokenizer_model='{path}' is not a readable {kind} tokenizer ({reason}); check the file, or give "
        "the right "
        f"tokenizer_type (one of {', '.join(KINDS)})."
    )

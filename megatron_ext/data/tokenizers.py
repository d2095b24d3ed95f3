"""Tokenizers behind one small interface: Hugging Face, SentencePiece and tiktoken vocabularies, from local
files only.

None of them ever maps text to a control token: a document that contains the characters of an end-of-document
token does not end there. Programs append `eod` themselves.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.errors import ConfigError

KINDS = ("huggingface", "sentencepiece", "tiktoken")

EOD_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<eod>", "<|eod|>")
"""End-of-document tokens to look for, in this order, in a vocabulary that does not say which one it uses."""

TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging: contractions, words,
up to three digits, signs, line ends, spaces."""

_TIKTOKEN_CHUNK = 400_000
"""Characters given to tiktoken at a time: its regular expressions overflow the stack
on longer runs of white space."""


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

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any added begin or end token."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, control tokens included where the vocabulary gives them a name."""


class _LoadedTokenizer:
    """A tokenizer made of a vocabulary and of two functions of a library."""

    def __init__(
        self,
        pieces: Mapping[int, str | bytes],
        eod: int,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.vocab_size = max(pieces) + 1
        self.eod = eod
        self.fingerprint = _fingerprint(pieces.items())
        self.encode = encode
        self.decode = decode


def load_tokenizer(kind: str, path: str | None) -> Tokenizer:
    """Load a tokenizer from local files; nothing is downloaded.

    `kind` is one of:
      huggingface    a directory as saved by `save_pretrained`, or a bare tokenizer.json
      sentencepiece  a .model file
      tiktoken       a file of "base64-token rank" lines, such as Llama 3's tokenizer.model. Text is split by
                     `TIKTOKEN_PATTERN`; Llama 3's 256 special tokens take the ids after the last rank,
                     which is where Llama 3 has them; documents end with <|end_of_text|>

    Raises ConfigError if the path is missing, is of another kind, or defines no end-of-document token.
    """
    loaders = {
        "huggingface": _load_huggingface,
        "sentencepiece": _load_sentencepiece,
        "tiktoken": _load_tiktoken,
    }
    if kind not in loaders:
        raise ConfigError(f"tokenizer_type={kind!r} is unknown; use one of {', '.join(loaders)}.")
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


def _fingerprint(pieces: Iterable[tuple[int, str | bytes]]) -> str:
    digest = hashlib.sha256()
    for index, piece in sorted(pieces, key=lambda item: item[0]):
        data = piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
        digest.update(b"%d %d " % (index, len(data)) + data)
    return digest.hexdigest()[:16]


def _named_eod(vocabulary: Mapping[str, int], path: Path) -> int:
    for name in EOD_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise ConfigError(
        f"tokenizer_model='{path}' names no end-of-document token, and its vocabulary has none of "
        f"{', '.join(EOD_NAMES)}. Add one of them."
    )


def _wrong_kind(path: Path, kind: str, reason: object) -> ConfigError:
    return ConfigError(
        f"tokenizer_model='{path}' is not a readable {kind} tokenizer ({reason}); check the file, or give "
        f"the right tokenizer_type (one of {', '.join(KINDS)})."
    )


def _load_huggingface(path: Path) -> Tokenizer:
    if path.is_dir() and (
        (path / "tokenizer_config.json").exists() or not (path / "tokenizer.json").exists()
    ):
        return _load_huggingface_directory(path)
    return _load_tokenizer_json(path / "tokenizer.json" if path.is_dir() else path)


def _load_huggingface_directory(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _wrong_kind(path, "huggingface", str(error).split("\n", 1)[0]) from error
    tokenizer.model_max_length = 2**62  # documents are of any length; without this each long one is warned of
    vocabulary = tokenizer.get_vocab()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    eod = tokenizer.eos_token_id
    return _LoadedTokenizer(
        {index: piece for piece, index in vocabulary.items()},
        _named_eod(vocabulary, path) if eod is None else eod,
        encode,
        decode,
    )


def _load_tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise _wrong_kind(path, "huggingface", error) from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    pieces = {index: piece for piece, index in vocabulary.items()}
    return _LoadedTokenizer(pieces, _eod_beside(path, vocabulary), encode, decode)


def _eod_beside(path: Path, vocabulary: Mapping[str, int]) -> int:
    """The eos_token of a special_tokens_map.json in the same directory, else a token with a usual name."""
    names = path.with_name("special_tokens_map.json")
    token = json.loads(names.read_text(encoding="utf-8")).get("eos_token") if names.exists() else None
    name = str(token.get("content") if isinstance(token, dict) else token)
    return vocabulary[name] if name in vocabulary else _named_eod(vocabulary, path)


def _load_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise _wrong_kind(path, "sentencepiece", "not a SentencePiece model") from error
    pieces = {index: processor.IdToPiece(index) for index in range(processor.GetPieceSize())}
    eod = processor.eos_id()
    if eod < 0:
        eod = _named_eod({piece: index for index, piece in pieces.items()}, path)
    return _LoadedTokenizer(pieces, eod, processor.EncodeAsIds, processor.DecodeIds)


def _load_tiktoken(path: Path) -> Tokenizer:
    import tiktoken

    ranks = _read_ranks(path)
    special = {name: len(ranks) + offset for offset, name in enumerate(_llama3_special_tokens())}
    encoding = tiktoken.Encoding(
        path.name,
        pat_str=TIKTOKEN_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=special,
        explicit_n_vocab=None,
    )

    def encode(text: str) -> list[int]:
        if len(text) <= _TIKTOKEN_CHUNK:
            return encoding.encode_ordinary(text)
        chunks = (text[start : start + _TIKTOKEN_CHUNK] for start in range(0, len(text), _TIKTOKEN_CHUNK))
        return [index for chunk in chunks for index in encoding.encode_ordinary(chunk)]

    pieces: dict[int, str | bytes] = {index: piece for piece, index in ranks.items()}
    pieces |= {index: name for name, index in special.items()}
    return _LoadedTokenizer(pieces, special["<|end_of_text|>"], encode, encoding.decode)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise _wrong_kind(path, "tiktoken", f"line {number} is not 'base64-token rank'") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise _wrong_kind(path, "tiktoken", "ranks are not 0, 1, 2, ... without gaps or repetitions")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _wrong_kind(path, "tiktoken", f"byte {missing[0]} has no rank of its own")
    return ranks


def _llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3, in the order of their ids."""
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = iter(range(256))
    return [
        named[place] if place in named else f"<|reserved_special_token_{next(reserved)}|>"
        for place in range(256)
    ]

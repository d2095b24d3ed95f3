"""Tokenizers in tiktoken's format: lines of "base64-token rank", such as Llama 3's tokenizer.model."""

import base64
import binascii
from pathlib import Path

from megatron_ext.data.vocabulary import LoadedTokenizer, wrong_kind

TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging: contractions, words, up to three digits, signs, line ends,
spaces."""

_TIKTOKEN_CHUNK = 400_000
"""Characters given to tiktoken at a time: its regular expressions overflow the stack on longer runs of white
space."""


def load_tiktoken(path: Path) -> LoadedTokenizer:
    """See `tokenizers.load_tokenizer`."""
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
    return LoadedTokenizer(pieces, special["<|end_of_text|>"], encode, encoding.decode)


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
                raise wrong_kind(path, "tiktoken", f"line {number} is not 'base64-token rank'") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise wrong_kind(path, "tiktoken", "ranks are not 0, 1, 2, ... without gaps or repetitions")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise wrong_kind(path, "tiktoken", f"byte {missing[0]} has no rank of its own")
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

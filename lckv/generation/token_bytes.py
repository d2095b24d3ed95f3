"""The bytes that each token adds to a text, whatever is before and behind it.

A token may be part of a character, and decoding it alone loses its leading space or its bytes.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

Piece = str
"""A token as the vocabulary writes it."""


class TokenBytes:
    """Of a Hugging Face tokenizer. Any thread may ask."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._hidden = {token for token, entry in added.items() if entry.special}
        self._hidden |= set(tokenizer.all_special_ids)
        self._special = {str(tokenizer.convert_ids_to_tokens(token)): token for token in self._hidden}
        decoder = _decoder(tokenizer)
        self._of_piece = _rule(decoder)
        self._drops_first_space = _drops_first_space(decoder)

    def special_token(self, name: str) -> int | None:
        """The number of the special token of that name; None if there is none, or texts show it."""
        return self._special.get(name)

    def bytes_of(self, token: int, *, first: bool = False) -> bytes | None:
        """What `token` adds to a text, in UTF-8; None for special tokens, which texts leave out. `first`:
        as the beginning of a text, where some decoders drop a space."""
        if token in self._hidden:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a vocabulary that was padded for the model
            return b""
        if self._of_piece is None:
            return self._decoded(token, piece, first)
        content = self._of_piece(piece)
        return content.removeprefix(b" ") if first and self._drops_first_space else content

    def text_of(self, token: int, *, first: bool = False) -> str:
        """The text of a token with its leading space; of a special one its name; of parts of characters their
        bytes, as OpenAI writes them: bytes:\\xe2\\x82. `first`: as in `bytes_of`."""
        content = self.bytes_of(token, first=first)
        if content is None:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def begins_text(self, prompt: Iterable[int]) -> bool:
        """Whether an answer to `prompt` is the beginning of the text, because all before is special."""
        return all(token in self._hidden for token in prompt)

    def _decoded(self, token: int, piece: Piece, first: bool) -> bytes:
        """By decoding, where the decoder's rules are not known: what a token adds behind itself."""
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte is not None:
            return bytes.fromhex(byte[1])
        alone = self._tokenizer.decode([token])
        text = alone if first else self._tokenizer.decode([token, token])[len(alone) :]
        return text.encode("utf-8")


def _decoder(tokenizer: Any) -> list[Mapping[str, Any]]:
    """The steps of the decoder as `tokenizers` describes them; empty where there is none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return []
    described = json.loads(decoder.__getstate__())
    return described["decoders"] if described["type"] == "Sequence" else [described]


def _rule(decoder: list[Mapping[str, Any]]) -> Callable[[Piece], bytes] | None:
    """How the decoder makes bytes of a piece; None where that is not known."""
    kinds = {step["type"] for step in decoder}
    if kinds == {"ByteLevel"}:
        return partial(_byte_level, {letter: byte for byte, letter in _letters_of_bytes()})
    spaces = [_space_sign(step) for step in decoder if step["type"] in ("Replace", "Metaspace")]
    if spaces and kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"} and None not in spaces:
        return partial(_with_spaces, [sign for sign in spaces if sign], "ByteFallback" in kinds)
    return None


def _space_sign(step: Mapping[str, Any]) -> str | None:
    """What a step replaces by a space; None if it does something else."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    return step["pattern"].get("String") if step["content"] == " " else None


def _drops_first_space(decoder: list[Mapping[str, Any]]) -> bool:
    return any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in decoder
    )


def _byte_level(bytes_of_letters: Mapping[str, int], piece: Piece) -> bytes:
    try:
        return bytes(bytes_of_letters[letter] for letter in piece)
    except KeyError:  # an added token, written as it is
        return piece.encode("utf-8")


def _with_spaces(signs: Iterable[str], byte_fallback: bool, piece: Piece) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece) if byte_fallback else None
    if byte is not None:
        return bytes.fromhex(byte[1])
    for sign in signs:
        piece = piece.replace(sign, " ")
    return piece.encode("utf-8")


def _letters_of_bytes() -> Iterable[tuple[int, str]]:
    """GPT-2's alphabet: bytes that are printable letters of Latin-1 stand for themselves, the others for the
    letters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    for byte in range(256):
        yield byte, chr(byte if byte in printable else next(others))

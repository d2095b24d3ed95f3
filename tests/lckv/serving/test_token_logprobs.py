"""Log-probabilities: an entry for each token, whose bytes are the text."""

from typing import Any

import pytest

from lckv.generation.requests import TokenEvent
from lckv.generation.token_bytes import TokenBytes
from lckv.serving.token_logprobs import TokenLogprobs
from tests.lckv.generation.tokenizers import byte_level, with_byte_fallback

TOKENIZERS = {"byte_level": byte_level(), "with_byte_fallback": with_byte_fallback()}
TEXT = " ab é€"


def events(tokens: list[int], best: list[tuple[int, float]] | None = None) -> list[TokenEvent]:
    return [TokenEvent("r", token, "", 0, None, -0.5, tuple(best or ())) for token in tokens]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "a"])
def test_joined_bytes_are_the_text(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    before, tokens = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, TEXT))
    entries = TokenLogprobs("chat", TokenBytes(tokenizer), before).of(
        events([*tokens, tokenizer.eos_token_id])
    )["content"]
    assert len(entries) == len(tokens) + 1
    whole, alone = tokenizer.decode(before + tokens), tokenizer.decode(before)
    joined = b"".join(bytes(entry["bytes"] or []) for entry in entries)
    assert joined.decode() == whole[len(alone) :]
    assert (entries[-1]["token"], entries[-1]["bytes"]) == ("<end>", None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_same_as_the_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    given = events(tokens, [(tokens[0], -0.5)])
    whole = TokenLogprobs("completion", TokenBytes(tokenizer), [1]).of(given)
    pieces = TokenLogprobs("completion", TokenBytes(tokenizer), [1])
    streamed: dict[str, list[Any]] = {name: [] for name in whole}
    for event in given:
        for field, values in pieces.of([event]).items():
            streamed[field] += values
    assert streamed == whole
    # Parts of a character are where it begins.
    for token, offset in zip(whole["tokens"], whole["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert TEXT[offset:].startswith(token)
        else:
            assert TEXT[offset] in "é€"


def test_tokens_that_look_alike_have_an_entry_each() -> None:
    tokenizer = with_byte_fallback()
    letter, byte, half = tokenizer.convert_tokens_to_ids(["a", "<0x61>", "<0xE2>"])
    given = events([letter], [(letter, -0.5), (byte, -1.0), (half, float("-inf"))])
    table = TokenBytes(tokenizer)
    chat = TokenLogprobs("chat", table, [1]).of(given)["content"][0]["top_logprobs"]
    assert [entry["token"] for entry in chat] == ["a", "a", "bytes:\\xe2"]
    assert [entry["bytes"] for entry in chat] == [[97], [97], [0xE2]]
    legacy = TokenLogprobs("completion", table, [1]).of(given)["top_logprobs"]
    assert legacy == [{"a": -0.5, f"token_id:{byte}": -1.0, "bytes:\\xe2": -9999.0}]


def test_none_where_none_were_asked_for() -> None:
    assert TokenLogprobs("chat", TokenBytes(byte_level()), []).of([TokenEvent("r", 5, "x", 0)]) is None

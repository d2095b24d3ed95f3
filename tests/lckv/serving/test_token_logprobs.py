"""Log-probabilities: an entry for each token, whose bytes are the text."""

from dataclasses import replace
from typing import Any

import pytest

from lckv.generation.requests import TokenEvent
from lckv.generation.sampling import Choice
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


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_echoed_prompt_comes_first(name: str, streamed: bool) -> None:
    tokenizer = TOKENIZERS[name]
    end = tokenizer.eos_token_id
    own = tokenizer.encode("ab é€", add_special_tokens=False)
    prompt, answer = [end, *own, end, *own], tokenizer.encode(" a€", add_special_tokens=False)
    echoed = tokenizer.decode(prompt)
    assert echoed.count("<end>") == 2
    first, *others = events(answer)
    following = tuple(Choice(token, -0.25, ((token, -0.25),)) for token in prompt[1:])
    given = [replace(first, prompt_logprobs=following), *others]
    logprobs = TokenLogprobs("completion", TokenBytes(tokenizer), prompt, echoed)
    parts = [logprobs.of([event]) for event in given] if streamed else [logprobs.of(given)]
    found: dict[str, list[Any]] = {name: [x for part in parts for x in part[name]] for name in parts[0]}
    assert found["token_logprobs"] == [None] + [-0.25] * (len(prompt) - 1) + [-0.5] * len(answer)
    assert found["top_logprobs"][0] is None
    assert all(len(best) == 1 for best in found["top_logprobs"][1 : len(prompt)])
    text = echoed + tokenizer.decode(prompt + answer)[len(echoed) :]
    assert found["text_offset"][len(prompt)] == len(echoed)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if token.startswith("bytes:"):
            assert text[offset] in "é€"
        else:
            assert text[offset:].startswith(token)


def test_special_tokens_that_an_echoed_text_does_not_show_are_nowhere() -> None:
    tokenizer = byte_level()
    prompt = [tokenizer.eos_token_id, *tokenizer.encode("ab", add_special_tokens=False)]
    event = TokenEvent("r", None, "", 0, "length", prompt_logprobs=tuple(Choice(t, -1.0) for t in prompt[1:]))
    found = TokenLogprobs("completion", TokenBytes(tokenizer), prompt, "ab").of([event])
    assert found is not None
    assert found["text_offset"] == [0, 0, 1][: len(prompt)] and found["tokens"][0] == "<end>"


def test_none_where_none_were_asked_for() -> None:
    assert TokenLogprobs("chat", TokenBytes(byte_level()), []).of([TokenEvent("r", 5, "x", 0)]) is None

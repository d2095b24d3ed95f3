"""Text from tokens, one by one: the same as from all of them, whole characters, and exact stop texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.generation.detokenize import AnswerText, Detokenizer, StopTexts
from lckv.generation.token_bytes import TokenBytes
from tests.lckv.generation.tokenizers import byte_level, with_byte_fallback

TOKENIZERS = {"byte_level": byte_level(), "with_byte_fallback": with_byte_fallback()}
TABLES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
TEXTS = st.text(st.sampled_from("ab the é€😀 \n"), max_size=30)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, prompt=TEXTS)
def test_pieces_make_the_text_that_all_tokens_make(name: str, text: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    before, tokens = (tokenizer.encode(each, add_special_tokens=False) for each in (prompt, text))
    detokenizer = Detokenizer(TABLES[name], before)
    pieces = [detokenizer.add(token) for token in tokens]
    assert detokenizer.flush() == ""
    assert "\ufffd" not in "".join(pieces)
    whole, alone = tokenizer.decode(before + tokens), tokenizer.decode(before)
    assert alone + "".join(pieces) == whole


def test_a_space_at_the_beginning_of_the_answer_is_kept() -> None:
    tokenizer = with_byte_fallback()
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in ("ab", " ab"))
    assert tokenizer.decode(answer) == "ab"
    detokenizer = Detokenizer(TokenBytes(tokenizer), prompt)
    assert "".join(detokenizer.add(token) for token in answer) == " ab"


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("a😀b", add_special_tokens=False)
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    assert [detokenizer.add(token) for token in tokens] == ["a", "", "", "", "😀", "b"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    assert [detokenizer.add(token) for token in tokens] == ["a", "", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_are_no_characters_are_shown_and_hide_no_others(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    half = tokenizer.encode("€", add_special_tokens=False)[:1]
    line, letter = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "b"))
    detokenizer = Detokenizer(TABLES[name])
    tokens = [*half, *line, *half * 30, *letter]
    assert "".join(detokenizer.add(token) for token in tokens) == "\ufffd\n" + "\ufffd" * 30 + "b"


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain computation: letter by letter, up to the first place where a stop text is complete."""
    for end in range(1, len(text) + 1):
        stopped_by = [stop for stop in stops if text[:end].endswith(stop)]
        if stopped_by:
            return text[: end - max(map(len, stopped_by))], True
    return text, False


@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_are_found_wherever_they_begin(parts: list[str], stops: list[str]) -> None:
    matcher = StopTexts(stops)
    shown = ""
    for part in parts:
        shown += matcher.add(part)
        assert not any(stop in shown for stop in stops)
        if matcher.stopped_by is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.stopped_by is not None) == _cut("".join(parts), stops)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    matcher = StopTexts(["\nUser:"])
    assert [matcher.add(part) for part in ("Hello\n", "Us", "e me", "\n", "User", ":x")] == [
        "Hello",
        "",
        "\nUse me",
        "",
        "",
        "",
    ]
    assert matcher.stopped_by == "\nUser:"


def test_a_stop_text_may_turn_up_in_what_was_held_back_for_a_character() -> None:
    tokenizer = byte_level()
    answer = AnswerText(TokenBytes(tokenizer), ["b\ufffd"], ())
    tokens = tokenizer.encode("ab😀", add_special_tokens=False)[:-1]
    assert "".join(answer.add(token) for token in tokens) + answer.flush() == "a"
    assert answer.stopped_by == "b\ufffd"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<end>", "a b"),
        ("b<end>\n", "a "),
        ("<end>\n", "a b"),
        ("\nc", "a b"),  # in what is shown
        ("b\n", "a "),
        ("d<end>", "a b\nc"),
        ("<end>c", "a b\nc"),
    ],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_text_may_contain_a_special_token(name: str, stop: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = [
        token
        for part in ("a b", "\nc")
        for token in [*tokenizer.encode(part, add_special_tokens=False), tokenizer.eos_token_id]
    ]
    answer = AnswerText(TokenBytes(tokenizer), [stop], tokenizer.encode("x", add_special_tokens=False))
    shown = ""
    for token in tokens:
        shown += answer.add(token)
        if answer.stopped_by is not None:
            break
    else:
        shown += answer.flush()
    assert shown == text
    assert answer.stopped_by == (None if text == "a b\nc" else stop)


def test_text_behind_a_special_token_keeps_its_space() -> None:
    tokenizer = with_byte_fallback()
    tokens = [*tokenizer.encode("ab", add_special_tokens=False), tokenizer.eos_token_id]
    tokens += tokenizer.encode(" ab", add_special_tokens=False)
    for stops in ([], ["x"]):
        answer = AnswerText(TokenBytes(tokenizer), stops, ())
        assert "".join(answer.add(token) for token in tokens) + answer.flush() == "ab ab"

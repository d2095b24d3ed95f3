"""Grammars of every kind on every kind of tokenizer; those that ask for too much are refused in time."""

import json
import sys
import time
from typing import Any

import pytest

from lckv.generation import grammars as grammars_module
from lckv.generation.grammar import JSON_OBJECT, Grammar, json_rule
from lckv.generation.grammars import CompiledGrammar, GrammarError, Grammars
from lckv.generation.token_bytes import TokenBytes
from tests.lckv.generation.tokenizers import byte_level, with_byte_fallback

PADDED = 300
"""Tokens of a model whose vocabulary is larger than the tokenizer's."""

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def schema(content: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(content))


def grammars(tokenizer: Any = None, ends: tuple[int, ...] = (0,)) -> Grammars:
    return Grammars(TokenBytes(tokenizer or byte_level()), vocabulary=PADDED, ends=frozenset(ends))


def numbers(mask: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def accepts(compiled: CompiledGrammar, tokenizer: Any, text: str) -> bool:
    """Whether a text may be an answer, by the masks alone."""
    constraint = compiled.begin()
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if token not in numbers(constraint.allowed()):
            return False
        constraint.advance(token)
    return 0 in numbers(constraint.allowed())


@pytest.mark.parametrize("tokenizer", [byte_level(), with_byte_fallback()], ids=["bytes", "pieces"])
def test_texts_are_checked_whatever_tokens_they_are_made_of(tokenizer: Any) -> None:
    compiled = grammars(tokenizer).compile(schema(OBJECT))
    assert accepts(compiled, tokenizer, '{"a":12}')
    assert accepts(compiled, tokenizer, '{"a": -1}')
    assert accepts(compiled, tokenizer, '{\n    "a": 1\n}')
    for wrong in ('{"b":1}', '{"a":1', '{"a":1,"b":2}', '{"a":"1"}', '{"a":  1}', "the"):
        assert not accepts(compiled, tokenizer, wrong), wrong


def test_tokens_that_are_pieces_of_several_characters_are_allowed() -> None:
    tokenizer = byte_level()
    constraint = grammars(tokenizer).compile(Grammar("regex", "(the|tea)!")).begin()
    allowed = {tokenizer.convert_ids_to_tokens(token) for token in numbers(constraint.allowed())}
    assert allowed == {"t", "th", "the"}


def test_padding_and_special_tokens_are_never_allowed_but_for_the_end() -> None:
    tokenizer = byte_level()
    anything = grammars(tokenizer, ends=(0, 299)).compile(Grammar("regex", "(?s:.*)")).begin()
    allowed = numbers(anything.allowed())
    assert {0, 299} < allowed and not set(range(len(tokenizer), 299)) & allowed
    word = grammars(tokenizer).compile(Grammar("regex", "<end>")).begin()
    assert 0 not in numbers(word.allowed())


def test_a_model_without_an_end_can_only_go_on() -> None:
    constraint = grammars(ends=()).compile(Grammar("regex", "a*")).begin()
    (letter,) = byte_level()("a").input_ids
    assert {token for token in numbers(constraint.allowed()) if token < PADDED} == {letter}
    assert not constraint.advance(letter)


def test_special_tokens_can_be_part_of_a_grammar() -> None:
    constraint = (
        grammars(ends=(5,)).compile(Grammar("lark", f"start: <[0]> x\nx: {json_rule({'const': 1})}")).begin()
    )
    assert numbers(constraint.allowed()) == {0}


def test_two_answers_do_not_share_their_place() -> None:
    made = grammars()
    compiled = made.compile(Grammar("regex", "abc"))
    first, second = compiled.begin(), compiled.begin()
    (letter,) = byte_level()("a").input_ids
    first.advance(letter)
    assert numbers(first.allowed()) != numbers(second.allowed()) == {letter}


def test_a_wrong_token_is_said() -> None:
    constraint = grammars().compile(Grammar("regex", "abc")).begin()
    assert not constraint.advance(*byte_level()("x").input_ids)
    assert "doesn't satisfy the grammar" in (constraint.problem() or "")


def test_compiled_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = grammars()
    compiled = made.compile(JSON_OBJECT)
    monkeypatch.setattr(grammars_module, "_library", lambda: pytest.fail("compiled again"))
    assert made.compile(JSON_OBJECT) is compiled


def test_few_are_kept_beside_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "_KEPT", 1)
    made = grammars()
    used = made.compile(Grammar("regex", "a"))
    made.compile(Grammar("regex", "b"))
    assert len(made._recent) == 1 and made.compile(Grammar("regex", "a")) is used


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (schema({"type": "nothing"}), "Invalid type: nothing"),
        (schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (schema({"not": {}, "x-guidance": {"lenient": True}}), 'Unimplemented keys: \\["not"\\]'),
        (
            schema({"$ref": "http://example.com/x.json"}),
            "Resource 'http://example.com/x.json' is not present",
        ),
        (schema({"enum": []}), "Unsatisfiable schema"),
        (schema([1]), r"the schema is \[1\]; it must be a JSON object"),
        (Grammar("json_schema", "{"), "the schema is not JSON: "),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("lark", "start: other"), "other"),
    ],
)
def test_what_is_wrong_is_said(grammar: Grammar, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        grammars().compile(grammar)


def deep(levels: int) -> dict[str, Any]:
    """Lists in lists, each by a reference, so that the schema itself is flat."""
    inner = {
        f"d{level}": {"type": "array", "items": {"$ref": f"#/$defs/d{level + 1}"}} for level in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**inner, f"d{levels}": {"type": "null"}}}


def test_a_schema_that_would_exhaust_the_stack_is_refused() -> None:
    with pytest.raises(GrammarError, match="it is too complex: compiling it ended with status"):
        grammars().compile(schema(deep(3000)))
    grammars().compile(schema(deep(20)))


def test_a_schema_that_would_take_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "TRIAL_SECONDS", 1.0)
    patterns = [
        {"type": "string", "pattern": f"[a-z]*{letter}[a-z]*"} for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    started = time.monotonic()
    with pytest.raises(GrammarError, match="it is too complex: it was not compiled after 1 seconds"):
        grammars().compile(schema({"allOf": patterns}))
    assert time.monotonic() - started < 20


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match="pip install 'lckv-megatron\\[serve\\]'"):
        grammars().compile(JSON_OBJECT)

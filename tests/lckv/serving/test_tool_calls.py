"""Calls are found in answers of every format, however the text is cut; what is no call remains text."""

import json
from typing import Any

import pytest

from lckv.generation.detokenize import AnswerText
from lckv.generation.grammars import Grammars
from lckv.generation.token_bytes import TokenBytes
from lckv.serving.tool_calls import CallReader
from lckv.serving.tool_formats import FORMATS, ToolFormat, call_grammar, format_of
from tests.lckv.generation.test_grammars import accepts
from tests.lckv.generation.tokenizers import byte_level

HERMES, MISTRAL, LLAMA = FORMATS
PARAMETERS = {
    "add": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "integer"}},
    },
    "stop-it": {"type": "object", "properties": {}, "additionalProperties": False},
}
ADD, STOP = ("add", {"a": 1}), ("stop-it", {})
HERMES_ADD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
HERMES_STOP = '<tool_call>{"name": "stop-it", "arguments": {}}</tool_call>'


def read(tool_format: ToolFormat, pieces: list[str], *, parallel: bool = True) -> tuple[str, list[Any]]:
    reader = CallReader(tool_format, PARAMETERS, parallel=parallel)
    text, calls = "", []
    for number, piece in enumerate(pieces, 1):
        found = reader.add(piece, last=number == len(pieces))
        text += found.text
        calls += found.calls
    assert reader.count == len(calls) == len({call.call_id for call in calls})
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("tool_format", "answer", "text", "calls"),
    [
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [ADD]),
        (
            HERMES,
            f"Well.\n\n{HERMES_ADD}\n{HERMES_STOP}\n",
            "Well.",
            [ADD, STOP],
        ),
        (HERMES, '<tool_call>{"name": "stop-it"}', "", [STOP]),
        (HERMES, "a <tool_call>{</tool_call> b", "a <tool_call>{</tool_call> b", []),
        (
            HERMES,
            '<tool_call>{"name": "unknown"}</tool_call>',
            '<tool_call>{"name": "unknown"}</tool_call>',
            [],
        ),
        (HERMES, '<tool_call>{"name": ["add"]}</tool_call>', '<tool_call>{"name": ["add"]}</tool_call>', []),
        (HERMES, "<tool_call></tool_call>", "<tool_call></tool_call>", []),
        (HERMES, "a <tool and\n ", "a <tool and\n ", []),
        (HERMES, '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "arguments": {"a": 1}}', []),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "stop-it", "arguments": {}}]',
            "",
            [ADD, STOP],
        ),
        (MISTRAL, "[TOOL_CALLS] [", "[TOOL_CALLS] [", []),
        (LLAMA, ' {"name": "add", "parameters": {"a": 1}}', "", [ADD]),
        (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [ADD]),
        (
            LLAMA,
            '{"name": "add", "parameters": {"a": 1}}; {"name": "stop-it", "parameters": {}}',
            "",
            [ADD, STOP],
        ),
        (LLAMA, '{"name": "Bob", "age": 1}', '{"name": "Bob", "age": 1}', []),
        (LLAMA, 'So: {"name": "stop-it"}', 'So: {"name": "stop-it"}', []),
        (LLAMA, '{"name": "add", "parameters": 7}', '{"name": "add", "parameters": 7}', []),
        (LLAMA, "", "", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(
    tool_format: ToolFormat, answer: str, text: str, calls: list[Any]
) -> None:
    assert read(tool_format, [answer]) == (text, calls)
    assert read(tool_format, [*answer, ""]) == (text, calls)
    assert read(tool_format, [answer[:7], answer[7:20], answer[20:], ""]) == (text, calls)


def test_deep_nonsense_is_text() -> None:
    answer = f"<tool_call>{'[' * 100_000}</tool_call>"
    assert read(HERMES, [answer]) == (answer, [])


def test_only_one_call_where_no_others_are_wanted() -> None:
    one = '<tool_call>{"name": "stop-it"}</tool_call>'
    for pieces in ([f"a{one}\n{one} b"], [*f"a{one}\n{one} b"]):
        assert read(HERMES, pieces, parallel=False) == ("a", [STOP])
    assert read(MISTRAL, ['[TOOL_CALLS][{"name": "stop-it"}, {"name": "stop-it"}]'], parallel=False)[1] == [
        STOP
    ]


def test_text_comes_when_it_is_certain() -> None:
    reader = CallReader(HERMES, PARAMETERS, parallel=True)
    shown = [reader.add(piece).text for piece in ("Hello", " ", "you", " <tool", "s>", "\n")]
    assert shown == ["Hello", "", " you", "", " <tools>", ""]
    assert reader.add("", last=True).text == "\n"


def test_ids_are_as_long_as_templates_want() -> None:
    for tool_format, length in ((HERMES, 29), (MISTRAL, 9)):
        reader = CallReader(tool_format, PARAMETERS, parallel=True)
        call = f'{tool_format.opens}{{"name": "stop-it"}}{tool_format.closes or ""}'
        assert len(reader.add(call, last=True).calls[0].call_id) == length


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ("...{{ tools | tojson }} <tool_call>\\n{...}\\n</tool_call>", HERMES),
        ('{{- "[TOOL_CALLS] [" }}', MISTRAL),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', LLAMA),
        ("<tool_call>\\n<function=example>", None),
        ("[TOOL_CALLS]{{ name }}[ARGS]", None),
        ("{{ tools }}", None),
    ],
)
def test_templates_say_the_format(template: str, tool_format: ToolFormat | None) -> None:
    assert format_of(template) is tool_format


@pytest.mark.parametrize("tool_format", FORMATS, ids=["hermes", "mistral", "llama"])
def test_what_a_grammar_prescribes_is_read(tool_format: ToolFormat) -> None:
    tokenizer = byte_level()
    made = Grammars(TokenBytes(tokenizer), vocabulary=len(tokenizer), ends=frozenset({0}))

    def written(*calls: tuple[str, dict[str, Any]]) -> str:
        each = [
            f'{{"name": "{name}", "{tool_format.arguments}": {json.dumps(given)}}}' for name, given in calls
        ]
        opening = "" if tool_format.bare else tool_format.opens + tool_format.before
        return opening + tool_format.between.join(each) + tool_format.after

    for parallel in (True, False):
        grammar = call_grammar(tool_format, PARAMETERS, parallel=parallel, special_token=lambda name: None)
        compiled = made.compile(grammar)
        assert accepts(compiled, tokenizer, written(ADD))
        assert accepts(compiled, tokenizer, written(STOP))
        assert accepts(compiled, tokenizer, written(ADD, STOP)) == parallel
        assert not accepts(compiled, tokenizer, written(("add", {"a": "1"})))
        assert not accepts(compiled, tokenizer, written(("other", {})))
        assert not accepts(compiled, tokenizer, "Well. " + written(STOP))
    assert read(tool_format, [*written(ADD, STOP)]) == ("", [ADD, STOP])


def test_marks_that_are_special_tokens_are_such_in_grammars_and_texts() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    texts = TokenBytes(tokenizer)
    mark = texts.special_token("[TOOL_CALLS]")
    assert mark == len(tokenizer) - 1 and texts.special_token("the") is None
    made = Grammars(texts, vocabulary=len(tokenizer), ends=frozenset({0}))
    grammar = call_grammar(MISTRAL, PARAMETERS, parallel=True, special_token=texts.special_token)
    answer = '[TOOL_CALLS] [{"name": "stop-it", "arguments": {}}]'
    assert accepts(made.compile(grammar), tokenizer, answer)
    tokens = tokenizer(answer).input_ids
    assert tokens[0] == mark
    shown, hidden = AnswerText(texts, (), [5], [mark]), AnswerText(texts, (), [5])
    assert "".join(shown.add(token) for token in tokens) == answer
    assert "".join(hidden.add(token) for token in tokens) == answer.removeprefix("[TOOL_CALLS]")

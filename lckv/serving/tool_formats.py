"""How models write calls of functions: found out from the chat template, read from answers, and prescribed by
a grammar where an answer must be a call."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lckv.generation.grammar import Grammar, json_rule


class ToolFormat(NamedTuple):
    """One way to write calls: a mark, JSON with a name and arguments, perhaps another mark."""

    signs: tuple[str, ...]
    """A template that has one of these is of this format,"""

    lacks: tuple[str, ...]
    """unless it has one of these, which later formats with the same marks have."""

    opens: str
    closes: str | None
    """None: calls go on to the end of the answer."""

    arguments: str
    """The name of the field with the arguments."""

    before: str
    """What models write between the first mark and the first call,"""

    between: str
    """between two calls,"""

    after: str
    """and behind the last one."""

    bare: bool = False
    """Whether answers may begin with the JSON itself, and those that must be calls do."""

    id_letters: int | None = None
    """Letters and digits of a call's id, where templates insist on a number."""


FORMATS = (
    # Hermes, Qwen 2.5 and 3
    ToolFormat(
        ("<tool_call>",), ("<function=", "<arg_key>"), "<tool_call>", "</tool_call>", "arguments",
        before="\n", between="\n</tool_call>\n<tool_call>\n", after="\n</tool_call>",
    ),
    # Mistral, up to its third tokenizer
    ToolFormat(
        ("[TOOL_CALLS]",), ("[ARGS]", "[CALL_ID]"), "[TOOL_CALLS]", None, "arguments",
        before=" [", between=", ", after="]", id_letters=9,
    ),
    # Llama 3.1 to 3.3
    ToolFormat(
        ("<|python_tag|>", '"parameters": dictionary'), (), "<|python_tag|>", None, "parameters",
        before="", between="; ", after="", bare=True,
    ),
)  # fmt: skip


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template tells the model to use; None if it is none of these."""
    for tool_format in FORMATS:
        if any(sign in template for sign in tool_format.signs):
            return None if any(sign in template for sign in tool_format.lacks) else tool_format
    return None


def call_grammar(
    tool_format: ToolFormat,
    parameters: Mapping[str, Mapping[str, Any]],
    *,
    parallel: bool,
    special_token: Callable[[str], int | None],
) -> Grammar:
    """Of answers that are calls of functions with these parameters. `special_token`: the number of a special
    token by its name."""

    def written(text: str) -> str:
        """A part of a rule, in which marks that are special tokens are such."""
        for mark in (tool_format.closes, tool_format.opens):
            if mark is not None and mark in text and (token := special_token(mark)) is not None:
                before, _, behind = text.partition(mark)
                return f"{written(before)} <[{token}]> {written(behind)}"
        return json.dumps(text) if text else ""

    rules = []
    for number, (name, schema) in enumerate(parameters.items()):
        head = f'{{"name": {json.dumps(name)}, "{tool_format.arguments}": '
        rules += [f'call_{number}: {json.dumps(head)} arguments_{number} "}}"']
        rules += [f"arguments_{number}: {json_rule(schema)}"]
    opening = "" if tool_format.bare else tool_format.opens + tool_format.before
    more = f"({written(tool_format.between)} call)*" if parallel else ""
    start = f"start: {written(opening)} call {more} {written(tool_format.after)}"
    calls = "call: " + " | ".join(f"call_{number}" for number in range(len(parameters)))
    return Grammar("lark", "\n".join([start, calls, *rules]))

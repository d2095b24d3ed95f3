"""What the text of an answer must be: a grammar, as a request describes it.

Grammars are compiled in `grammars.py` and held to in `constraints.py`; this module needs no library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_SETTINGS = {
    # Models that fall into white space would go on with it until their answer is cut off.
    "whitespace_pattern": r"\x20|\r?\n[\x20\x09]{0,40}",
    "lenient": False,  # what the library does not know is an error
}


@dataclass(frozen=True)
class Grammar:
    """All texts that an answer may be. The answer ends where it is complete and cannot go on."""

    kind: Literal["json_schema", "regex", "lark"]
    """`json_schema`: JSON that the schema `text` allows. `regex`: what `text` matches as a whole, in the
    syntax of Rust. `lark`: what the rule `start` derives, in llguidance's variant of Lark."""

    text: str


JSON_OBJECT = Grammar("json_schema", '{"type": "object"}')
"""Any JSON object."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a Lark rule for JSON that a schema allows, with at most one space or line break, and
    indentation, between its parts."""
    return "%json " + json.dumps({**schema, "x-guidance": _SETTINGS})

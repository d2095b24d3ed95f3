"""What form a request wants its answers to have (`response_format`)."""

import json
from typing import Any

from lckv.generation.grammar import JSON_OBJECT, Grammar
from lckv.serving.errors import ApiError, shown
from lckv.serving.fields import BOOLEAN, OBJECT, TEXT, Fields
from lckv.serving.limits import ServingLimits
from lckv.serving.sizes import check_count

FIELD = "response_format"
KINDS = ("text", "json_object", "json_schema")


def response_grammar(fields: Fields, limits: ServingLimits) -> Grammar | None:
    """None for any text. Raises ApiError."""
    given = fields.take(FIELD)
    if given is None:
        return None
    wanted = Fields(given, FIELD)
    kind = wanted.need("type", TEXT)
    if kind not in KINDS:
        where = wanted.path("type")
        raise ApiError(400, f"{where} is {shown(kind)}; it must be one of {', '.join(KINDS)}.", param=FIELD)
    schema = wanted.need("json_schema", OBJECT) if kind == "json_schema" else None
    wanted.refuse_others({})
    if schema is not None:
        return _schema(Fields(schema, wanted.path("json_schema")), limits)
    return JSON_OBJECT if kind == "json_object" else None


def _schema(described: Fields, limits: ServingLimits) -> Grammar:
    """Answers are held to a schema whether `strict` is true or not."""
    for name, kind in (("name", TEXT), ("description", TEXT), ("strict", BOOLEAN)):
        described.take(name, kind)
    schema = described.need("schema", OBJECT)
    described.refuse_others({})
    return Grammar("json_schema", checked_schema(schema, described.path("schema"), limits))


def checked_schema(schema: Any, path: str, limits: ServingLimits) -> str:
    """A schema as JSON. Raises ApiError if it is too long."""
    text = json.dumps(schema, ensure_ascii=False)
    check_count(len(text), limits.max_schema_characters, path, "characters as JSON", least=0)
    return text

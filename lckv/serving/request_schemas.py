"""What requests may hold, as JSON schemas for `/openapi.json`. `protocol.py` is what reads them."""

from collections.abc import Mapping
from typing import Any

from lckv.generation.factors import LEAST, MOST, RANGE
from lckv.generation.penalties import MOST_BIAS, MOST_PENALTY
from lckv.generation.sampling import MAX_LOGPROBS
from lckv.serving.accepted import ACCEPTED_OF_STREAMS
from lckv.serving.limits import ServingLimits
from lckv.serving.messages import ROLES
from lckv.serving.protocol import ACCEPTED_OF_CHATS, ACCEPTED_OF_COMPLETIONS, COMPLETION_TOKENS
from lckv.serving.response_format import KINDS
from lckv.serving.tools import CHOICES

Schema = dict[str, Any]


def completion_schema(limits: ServingLimits) -> Schema:
    """Of POST /v1/completions."""
    token_lists = _list(_tokens(limits), limits.max_prompts)
    texts = _list(_characters(limits), limits.max_prompts)
    return _object(
        {
            "prompt": {
                "description": "A text, a list of texts, a list of token ids, or a list of such lists.",
                "anyOf": [_characters(limits), texts, _tokens(limits), token_lists],
            },
            **_of_both(limits),
            "max_tokens": _length(
                "Tokens of the longest answer; 0: none, with echo only.", limits, COMPLETION_TOKENS, least=0
            ),
            "logprobs": _optional(
                {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
                "Log-probabilities of the answer's tokens, with echo also of the prompt's, and of so many "
                "likeliest ones.",
            ),
            "best_of": _optional({"type": "integer"}, "As many as n."),
            "echo": _flag("The prompt comes before the answer.", False),
            "add_special_tokens": _flag("The tokenizer puts its own tokens around texts.", True),
        },
        accepted=ACCEPTED_OF_COMPLETIONS,
        required=["prompt"],
    )


def chat_schema(limits: ServingLimits) -> Schema:
    """Of POST /v1/chat/completions."""
    longest = "Tokens of the longest answer; by default as many as there is room for."
    return _object(
        {
            "messages": {
                **_list(_message(), limits.max_messages),
                "description": "The chat so far, for the tokenizer's chat template.",
            },
            **_of_both(limits),
            "max_completion_tokens": _length(longest, limits, None),
            "max_tokens": _length("Former name of max_completion_tokens.", limits, None),
            "logprobs": _flag("Log-probabilities of the answer's tokens.", False),
            "top_logprobs": _optional(
                {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
                "And those of so many likeliest tokens.",
            ),
            **_tools(limits),
            "add_generation_prompt": _flag(
                "The template ends with the beginning of an answer; not if continue_final_message is true.",
                True,
            ),
            "continue_final_message": _flag("The answer goes on from within the last message.", False),
            "add_special_tokens": _flag("The tokenizer puts its own tokens around the template's.", False),
            "chat_template_kwargs": _optional(
                {"type": "object"},
                "For the template, such as enable_thinking; a template that does not read it ignores it. At "
                f"most {limits.max_template_characters} characters as JSON.",
            ),
            "safety_identifier": _optional({"type": "string"}, "Without effect."),
            "prompt_cache_key": _optional({"type": "string"}, "Without effect."),
        },
        accepted=ACCEPTED_OF_CHATS,
        required=["messages"],
    )


def _of_both(limits: ServingLimits) -> dict[str, Schema]:
    number = {"type": "number"}
    penalty = {**number, "minimum": -MOST_PENALTY, "maximum": MOST_PENALTY, "default": 0}
    stop = {"type": "string", "minLength": 1, "maxLength": limits.max_stop_characters}
    return {
        "model": _optional({"type": "string"}, "The name of the model that is served."),
        "stream": _flag("Send the answer as server-sent events while it is made.", False),
        "stream_options": _optional(
            _object(
                {"include_usage": _flag("A last event has the numbers of tokens.", False)},
                accepted=ACCEPTED_OF_STREAMS,
            ),
            "Only where stream is true.",
        ),
        "n": _optional(
            {"type": "integer", "minimum": 1, "maximum": limits.answers, "default": 1},
            f"Answers to each prompt; at most {limits.answers} to all.",
        ),
        "temperature": _optional(
            {**number, "minimum": 0, "maximum": MOST, "default": 1},
            f"Logits are divided by it, {RANGE}; 0: the likeliest token.",
        ),
        "top_p": _optional(
            {**number, "exclusiveMinimum": 0, "maximum": 1, "default": 1},
            "Only the likeliest tokens that together reach it.",
        ),
        "top_k": _optional(
            {"type": "integer", "minimum": -1}, "Only so many likeliest tokens; 0 and -1: all."
        ),
        "min_p": _optional(
            {**number, "minimum": 0, "maximum": 1, "default": 0},
            "Only tokens so probable, relative to the likeliest one.",
        ),
        "repetition_penalty": _optional(
            {**number, "minimum": LEAST, "maximum": MOST, "default": 1},
            "Above 1: tokens of prompt and answer become less probable.",
        ),
        "presence_penalty": _optional(penalty, "Above 0: less of tokens that the answer has."),
        "frequency_penalty": _optional(
            penalty, "Above 0: less of tokens, for each time that the answer has them."
        ),
        "logit_bias": _optional(
            {
                "type": "object",
                "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
                "additionalProperties": {**number, "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
                "maxProperties": limits.max_biases,
            },
            "Added to the logits of tokens, which are the names; -100: never, 100: always.",
        ),
        "seed": _optional({"type": "integer"}, "The same seed gives the same answer."),
        "stop": _optional(
            {"anyOf": [stop, _list(stop, limits.max_stops, least=0)]},
            "The answer ends before any of these texts.",
        ),
        "stop_token_ids": _optional(
            _list({"type": "integer", "minimum": 0}, limits.max_stops, least=0),
            "The answer ends with any of these tokens.",
        ),
        "ignore_eos": _flag("Go on behind the end of a text.", False),
        "response_format": _optional(_response_format(), "What the answer's text must be."),
        "user": _optional({"type": "string"}, "Without effect."),
    }


def _response_format() -> Schema:
    described = {"name": {"type": "string"}, "description": {"type": "string"}, "schema": {"type": "object"}}
    schema = _object({**described, "strict": {"type": "boolean"}}, accepted={}, required=["schema"])
    return _object({"type": {"enum": list(KINDS)}, "json_schema": schema}, accepted={}, required=["type"])


def _tools(limits: ServingLimits) -> dict[str, Schema]:
    text = {"type": "string"}
    function = _object(
        {"name": text, "description": text, "parameters": {"type": "object"}, "strict": {"type": "boolean"}},
        accepted={},
        required=["name"],
    )
    tool = _object(
        {"type": {"enum": ["function"]}, "function": function}, accepted={}, required=["type", "function"]
    )
    chosen = _object({"name": text}, accepted={}, required=["name"])
    choice = _object(
        {"type": {"enum": ["function"]}, "function": chosen}, accepted={}, required=["type", "function"]
    )
    return {
        "tools": _optional(
            _list(tool, limits.max_tools, least=0),
            "Functions that the model may call, where its chat template has tools.",
        ),
        "tool_choice": _optional(
            {"anyOf": [{"enum": list(CHOICES)}, choice], "default": "auto"},
            "Whether the answer may, must not or must be a call; a function: a call of that one.",
        ),
        "parallel_tool_calls": _flag("Whether an answer may be several calls.", True),
    }


def _message() -> Schema:
    part = _object(
        {"type": {"enum": ["text"]}, "text": {"type": "string"}}, accepted={}, required=["type", "text"]
    )
    call = {"id": {"type": "string"}, "type": {"enum": ["function"]}, "function": {"type": "object"}}
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}, {"type": "null"}]}
    return {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": content,
            "tool_calls": {"type": "array", "items": {"type": "object", "properties": call}},
            "tool_call_id": {"type": "string"},
        },
        "required": ["role"],
    }


def _object(
    properties: dict[str, Schema],
    *,
    accepted: Mapping[str, tuple[Any, ...]],
    required: list[str] | None = None,
) -> Schema:
    """`accepted`: fields of which only these values, and null, are supported."""
    others = {
        name: {"enum": [*values, None], "description": "Other values are not supported."}
        for name, values in accepted.items()
    }
    made: Schema = {"type": "object", "properties": properties | others, "additionalProperties": False}
    return made if required is None else {**made, "required": required}


def _optional(schema: Schema, description: str) -> Schema:
    """Null is as if the field were not there."""
    default = {"default": schema["default"]} if "default" in schema else {}
    values = {name: value for name, value in schema.items() if name != "default"}
    return {"anyOf": [values, {"type": "null"}], "description": description, **default}


def _flag(description: str, default: bool) -> Schema:
    return _optional({"type": "boolean", "default": default}, description)


def _length(description: str, limits: ServingLimits, default: int | None, *, least: int = 1) -> Schema:
    schema: Schema = {"type": "integer", "minimum": least, "maximum": limits.max_new_tokens}
    return _optional(schema if default is None else {**schema, "default": default}, description)


def _list(items: Schema, most: int, *, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _tokens(limits: ServingLimits) -> Schema:
    return _list({"type": "integer", "minimum": 0}, limits.max_prompt_tokens)


def _characters(limits: ServingLimits) -> Schema:
    return {"type": "string", "maxLength": limits.prompt_characters}

"""What a client may ask for: the requests of OpenAI's HTTP interface, and what they mean to the engine.

A field that is not listed is refused with its name, and so is a value that this server cannot honour: nothing
is ignored silently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lckv.generation.penalties import MOST_BIAS, biases_by_token
from lckv.generation.sampling import SamplingParams
from lckv.serving.accepted import ACCEPTED_OF_STREAMS, ACCEPTED_OF_VLLM, ACCEPTED_OF_VLLM_CHATS
from lckv.serving.errors import ApiError, shown
from lckv.serving.fields import BOOLEAN, INTEGER, LIST, NUMBER, OBJECT, TEXT, Fields, Kind, check
from lckv.serving.limits import ServingLimits
from lckv.serving.messages import conversation
from lckv.serving.sizes import check_characters, check_count, check_tokens
from lckv.serving.template_settings import template_settings

ACCEPTED_OF_COMPLETIONS = {**ACCEPTED_OF_VLLM, "suffix": ("",)}
"""Fields that clients send, of which only these values (and null) are supported."""

ACCEPTED_OF_CHATS = {
    **ACCEPTED_OF_VLLM_CHATS,
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory", "24h"),
}

COMPLETION_TOKENS = 16
"""Of a completion that does not say how many: OpenAI's default."""

_MANY = Kind(
    "a text, a list of texts, a list of token ids, or a list of such lists",
    lambda value: isinstance(value, str | list),
)
_NUMBER_OF_LOGPROBS = Kind("an integer", lambda value: value is False or INTEGER.fits(value))
"""Clients of chats say false where they want none."""

_BIAS = Kind(
    f"a number from -{MOST_BIAS:g} to {MOST_BIAS:g}",
    lambda value: NUMBER.fits(value) and abs(value) <= MOST_BIAS,
)
_STOPS = Kind("a text or a list of texts", lambda value: isinstance(value, str | list))


@dataclass(frozen=True)
class GenerationRequest:
    """What both kinds of requests have in common."""

    stream: bool
    include_usage: bool
    params: SamplingParams
    answers: int
    """To each prompt."""

    length_name: str
    """The field that says how long an answer may be."""

    add_special_tokens: bool
    """Whether the tokenizer's own go around a prompt that is a text."""


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompts: Sequence[str | list[int]]
    echo: bool


@dataclass(frozen=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    conversation: Sequence[Mapping[str, str]]
    """For the tokenizer's chat template."""

    template_settings: Mapping[str, Any]
    """What else the template is given."""

    fills_context: bool
    """Whether the answer may be as long as there is room."""


def completion_request(content: Mapping[str, Any], model: str, limits: ServingLimits) -> CompletionRequest:
    """From the body of a request. Raises ApiError."""
    fields = Fields(content)
    _check_model(fields, model)
    prompts = _prompts(fields.need("prompt", _MANY), limits)
    echo, logprobs = fields.take("echo", BOOLEAN, False), fields.take("logprobs", _NUMBER_OF_LOGPROBS)
    logprobs = None if logprobs is False else logprobs
    answers = _answers(fields, len(prompts), limits)
    best_of = fields.take("best_of", INTEGER, answers)
    if best_of != answers:
        message = f"best_of is {best_of} and n is {answers}; this server only supports as many, and null."
        raise ApiError(400, message, param="best_of")
    length = fields.take("max_tokens", INTEGER, COMPLETION_TOKENS)
    stream, include_usage = _stream(fields)
    params = _params(fields, limits, max_new_tokens=length, logprobs=logprobs)
    if echo and (length < 1 or logprobs is not None):
        params = replace(params, prompt_logprobs=logprobs or 0)
    _check_params(params, limits, {"max_new_tokens": "max_tokens"})
    special = fields.take("add_special_tokens", BOOLEAN, True)
    fields.refuse_others(ACCEPTED_OF_COMPLETIONS)
    return CompletionRequest(stream, include_usage, params, answers, "max_tokens", special, prompts, echo)


def chat_request(content: Mapping[str, Any], model: str, limits: ServingLimits) -> ChatRequest:
    """From the body of a request. Raises ApiError."""
    fields = Fields(content)
    _check_model(fields, model)
    turns = conversation(fields.need("messages", LIST), limits)
    answers, (length_name, length) = _answers(fields, 1, limits), _length(fields)
    logprobs, best = fields.take("logprobs", BOOLEAN, False), fields.take("top_logprobs", INTEGER)
    if best and not logprobs:
        raise ApiError(400, "top_logprobs is given, but logprobs is false.", param="top_logprobs")
    stream, include_usage = _stream(fields)
    params = _params(
        fields,
        limits,
        max_new_tokens=1 if length is None else length,
        logprobs=(best or 0) if logprobs else None,
    )
    _check_params(params, limits, {"max_new_tokens": length_name, "logprobs": "top_logprobs"})
    special, settings = fields.take("add_special_tokens", BOOLEAN, False), template_settings(fields, limits)
    for name in ("safety_identifier", "prompt_cache_key"):  # as `user`
        fields.take(name, TEXT)
    fields.refuse_others(ACCEPTED_OF_CHATS)
    fills = length is None
    return ChatRequest(stream, include_usage, params, answers, length_name, special, turns, settings, fills)


def _check_model(fields: Fields, model: str) -> None:
    asked = fields.take("model", TEXT, model)
    if asked != model:
        raise unknown_model(asked, model)


def unknown_model(asked: str, model: str) -> ApiError:
    """What is said to who asks for another model than the one that is served."""
    message = f"model {shown(asked)} is not served here; this is {model!r}."
    return ApiError(404, message, param="model", code="model_not_found")


def _answers(fields: Fields, prompts: int, limits: ServingLimits) -> int:
    """To each of so many prompts."""
    answers: int = fields.take("n", INTEGER, 1)
    check_count(prompts * answers, limits.answers, "n", "answers to all prompts")
    return answers


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether to send the numbers of tokens at the end."""
    stream, given = fields.take("stream", BOOLEAN, False), fields.take("stream_options")
    if given is None:
        return stream, False
    if not stream:
        raise ApiError(400, "stream_options is given, but stream is false.", param="stream_options")
    options = Fields(given, "stream_options")
    include_usage = options.take("include_usage", BOOLEAN, False)
    options.refuse_others(ACCEPTED_OF_STREAMS)
    return stream, include_usage


def _length(fields: Fields) -> tuple[str, int | None]:
    """The field for the length of a chat's answer that is given, and its value."""
    names = ("max_completion_tokens", "max_tokens")
    given = {name: value for name in names if (value := fields.take(name, INTEGER)) is not None}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise ApiError(400, f"{both}; give one of them.", param="max_tokens")
    return next(iter(given.items()), ("max_completion_tokens", None))


def _params(
    fields: Fields, limits: ServingLimits, *, max_new_tokens: int, logprobs: int | None
) -> SamplingParams:
    fields.take("user", TEXT)  # of no effect: nothing is stored
    top_k = fields.take("top_k", INTEGER)
    tokens = fields.take("stop_token_ids", LIST, [])
    check_count(len(tokens), limits.max_stops, "stop_token_ids", "tokens", least=0)
    return SamplingParams(
        temperature=fields.take("temperature", NUMBER, 1.0),
        top_k=None if top_k in (0, -1) else top_k,
        top_p=fields.take("top_p", NUMBER, 1.0),
        min_p=fields.take("min_p", NUMBER, 0.0),
        repetition_penalty=fields.take("repetition_penalty", NUMBER, 1.0),
        presence_penalty=fields.take("presence_penalty", NUMBER, 0.0),
        frequency_penalty=fields.take("frequency_penalty", NUMBER, 0.0),
        logit_bias=_biases(fields, limits),
        seed=fields.take("seed", INTEGER),
        max_new_tokens=max_new_tokens,
        stop=_stops(fields, limits),
        stop_token_ids=tuple(
            check(token, INTEGER, f"stop_token_ids[{place}]") for place, token in enumerate(tokens)
        ),
        ignore_eos=fields.take("ignore_eos", BOOLEAN, False),
        logprobs=logprobs,
    )


def _check_params(params: SamplingParams, limits: ServingLimits, names: Mapping[str, str]) -> None:
    problems = list(dict.fromkeys(params.problems({"prompt_logprobs": "logprobs", **names})))
    if problems:
        raise ApiError(400, " ".join(problems), param=problems[0].partition(" ")[0])
    if params.max_new_tokens > limits.max_new_tokens:
        name = names["max_new_tokens"]
        most = limits.max_new_tokens
        raise ApiError(400, f"{name} is {params.max_new_tokens}; at most {most} are allowed.", param=name)


def _biases(fields: Fields, limits: ServingLimits) -> dict[int, float] | None:
    given = fields.take("logit_bias", OBJECT, {})
    check_count(len(given), limits.max_biases, "logit_bias", "tokens", least=0)
    for name, value in given.items():
        check(value, _BIAS, f"logit_bias.{name}")
    try:
        return biases_by_token(given) or None
    except ValueError as error:
        raise ApiError(400, str(error), param="logit_bias") from error


def _stops(fields: Fields, limits: ServingLimits) -> tuple[str, ...]:
    given = fields.take("stop", _STOPS, [])
    if isinstance(given, str):
        return (_stop(given, "stop", limits),)
    check_count(len(given), limits.max_stops, "stop", "texts", least=0)
    return tuple(_stop(text, f"stop[{place}]", limits) for place, text in enumerate(given))


def _stop(text: Any, path: str, limits: ServingLimits) -> str:
    check_count(len(check(text, TEXT, path)), limits.max_stop_characters, path, "characters")
    return str(text)


def _prompts(given: Any, limits: ServingLimits) -> list[str | list[int]]:
    """Always several."""
    if isinstance(given, str):
        return [_text(given, "prompt", limits)]
    if given and INTEGER.fits(given[0]):
        return [_tokens(given, "prompt", limits)]
    check_count(len(given), limits.max_prompts, "prompt", "prompts")
    return [_prompt(member, f"prompt[{place}]", limits) for place, member in enumerate(given)]


def _prompt(given: Any, path: str, limits: ServingLimits) -> str | list[int]:
    check(given, _MANY._replace(words="a text or a list of token ids"), path)
    return _text(given, path, limits) if isinstance(given, str) else _tokens(given, path, limits)


def _text(given: str, path: str, limits: ServingLimits) -> str:
    check_characters(len(given), path, limits)
    return given


def _tokens(given: list[Any], path: str, limits: ServingLimits) -> list[int]:
    check_tokens(len(given), path, limits)
    return [check(token, INTEGER, f"{path}[{place}]") for place, token in enumerate(given)]

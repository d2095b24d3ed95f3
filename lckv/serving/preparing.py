"""From the body of a request to the engine's jobs: parsed, checked, templated and tokenised, in a thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lckv.generation.sampling import SamplingParams
from lckv.serving.body import parse_object
from lckv.serving.errors import ApiError
from lckv.serving.limits import ServingLimits
from lckv.serving.protocol import (
    CompletionRequest,
    GenerationRequest,
    chat_request,
    completion_request,
)
from lckv.serving.sizes import check_characters, check_tokens
from lckv.serving.time_limit import TEMPLATES, TookTooLongError, time_limit

_SAID = 500
"""Characters of a template's message that are passed on."""


@dataclass(frozen=True)
class Prepared:
    """A request that the engine can take."""

    request: GenerationRequest
    jobs: Sequence[tuple[Sequence[int], SamplingParams]]
    """Prompts, and how to continue them."""

    prefixes: Sequence[str]
    """For each answer, what stands before it: the prompt where it is echoed."""

    param: str
    """The field with the prompts."""


def prepare_completion(body: bytes, model: str, limits: ServingLimits, tokenizer: Any) -> Prepared:
    """Of POST /v1/completions. Raises ApiError."""
    request = completion_request(parse_object(body), model, limits)
    jobs = []
    for place, prompt in enumerate(request.prompts):
        path = "prompt" if len(request.prompts) == 1 else f"prompt[{place}]"
        tokens = _encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
        _check_job(request, tokens, path, limits)
        jobs.append((tokens, request.params))
    return Prepared(request, jobs, _prefixes(request, tokenizer), "prompt")


def prepare_chat(body: bytes, model: str, limits: ServingLimits, tokenizer: Any) -> Prepared:
    """Of POST /v1/chat/completions. Raises ApiError."""
    request = chat_request(parse_object(body), model, limits)
    text = _templated(tokenizer, request.conversation, limits.prepare_seconds)
    check_characters(len(text), "messages", limits)
    tokens = _encode(tokenizer, text, add_special_tokens=False)
    params = request.params
    if request.fills_context:
        room = max(1, limits.context - len(tokens))
        params = replace(params, max_new_tokens=min(limits.max_new_tokens, room))
    request = replace(request, params=params)
    _check_job(request, tokens, "messages", limits)
    return Prepared(request, [(tokens, params)], [""], "messages")


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)


def _templated(tokenizer: Any, conversation: Sequence[Mapping[str, str]], seconds: float) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(
            400, "this model's tokenizer has no chat template; use /v1/completions.", param="messages"
        )
    try:
        with time_limit(seconds, TEMPLATES):
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return str(text)
    except TookTooLongError:
        raise ApiError(
            503, f"messages: the model's chat template took more than {seconds:g} seconds.", param="messages"
        ) from None
    except Exception as error:  # templates are programs of their own: anything can go wrong in them
        said = str(error)[:_SAID]
        raise ApiError(
            400, f"messages: the model's chat template refuses them: {said}", param="messages"
        ) from error


def _prefixes(request: CompletionRequest, tokenizer: Any) -> list[str]:
    if not request.echo:
        return [""] * len(request.prompts)
    return [prompt if isinstance(prompt, str) else _text(prompt, tokenizer) for prompt in request.prompts]


def _text(prompt: list[int], tokenizer: Any) -> str:
    """Of tokens that may be any integers; the engine refuses those that are none of its own later."""
    return str(tokenizer.decode([token for token in prompt if 0 <= token < len(tokenizer)]))


def _check_job(request: GenerationRequest, tokens: Sequence[int], path: str, limits: ServingLimits) -> None:
    check_tokens(len(tokens), path, limits)
    most = request.params.max_new_tokens
    if len(tokens) + most > limits.context:
        name = request.length_name
        raise ApiError(
            400,
            f"{path} has {len(tokens)} tokens and {name} is {most}; together they may be at most "
            f"{limits.context}.",
            param=name,
        )

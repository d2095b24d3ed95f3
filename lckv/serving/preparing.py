"""From the body of a request to the engine's jobs: parsed, checked, templated and tokenised, in a thread."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lckv.generation.sampling import SamplingParams
from lckv.serving.body import parse_object
from lckv.serving.errors import ApiError
from lckv.serving.limits import ServingLimits
from lckv.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    chat_request,
    completion_request,
)
from lckv.serving.sizes import check_characters, check_count, check_tokens
from lckv.serving.template_settings import check_names
from lckv.serving.time_limit import TEMPLATES, TookTooLongError, time_limit

_SAID = 500
"""Characters of a template's message that are passed on."""


@dataclass(frozen=True)
class Prepared:
    """A request that the engine can take."""

    request: GenerationRequest
    jobs: Sequence[tuple[Sequence[int], SamplingParams]]
    """For each answer its prompt, and how to continue it."""

    prefixes: Sequence[str]
    """For each answer, what stands before it: the prompt where it is echoed."""

    prompt_tokens: int
    """Of all prompts, once each."""

    param: str
    """The field with the prompts."""


def prepare_completion(body: bytes, model: str, limits: ServingLimits, tokenizer: Any) -> Prepared:
    """Of POST /v1/completions. Raises ApiError."""
    request = completion_request(parse_object(body), model, limits)
    prompts = []
    for place, prompt in enumerate(request.prompts):
        path = "prompt" if len(request.prompts) == 1 else f"prompt[{place}]"
        tokens = _encode(request, tokenizer, prompt) if isinstance(prompt, str) else prompt
        _check_job(request, tokens, path, limits)
        prompts.append(tokens)
    if request.params.prompt_logprobs is not None:
        count = sum(map(len, prompts)) * request.answers * (1 + request.params.prompt_logprobs)
        check_count(count, limits.max_prompt_logprobs, "logprobs", "log-probabilities of prompts")
    return _prepared(request, prompts, _prefixes(request, tokenizer), "prompt")


def prepare_chat(body: bytes, model: str, limits: ServingLimits, tokenizer: Any) -> Prepared:
    """Of POST /v1/chat/completions. Raises ApiError."""
    request = chat_request(parse_object(body), model, limits)
    text = _templated(tokenizer, request, limits.prepare_seconds)
    check_characters(len(text), "messages", limits)
    tokens = _encode(request, tokenizer, text)
    params = request.params
    if request.fills_context:
        room = max(1, limits.context - len(tokens))
        params = replace(params, max_new_tokens=min(limits.max_new_tokens, room))
    request = replace(request, params=params)
    _check_job(request, tokens, "messages", limits)
    return _prepared(request, [tokens], [""], "messages")


def _prepared(
    request: GenerationRequest, prompts: Sequence[Sequence[int]], prefixes: Sequence[str], param: str
) -> Prepared:
    """With as many answers to each prompt as were asked for, one behind the other."""
    of_answers = [
        replace(request.params, seed=_seed(request.params.seed, number)) for number in range(request.answers)
    ]
    return Prepared(
        request,
        [(prompt, params) for prompt in prompts for params in of_answers],
        [prefix for prefix in prefixes for _ in of_answers],
        sum(map(len, prompts)),
        param,
    )


def _seed(seed: int | None, number: int) -> int | None:
    """Of the answer `number` of a request: the first has the request's own, as if it were alone."""
    if seed is None or number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8])


def _encode(request: GenerationRequest, tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=request.add_special_tokens, verbose=False).input_ids)


def _templated(tokenizer: Any, request: ChatRequest, seconds: float) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(
            400, "this model's tokenizer has no chat template; use /v1/completions.", param="messages"
        )
    check_names(request.template_settings, tokenizer)
    try:
        with time_limit(seconds, TEMPLATES):
            text = tokenizer.apply_chat_template(
                request.conversation, tokenize=False, **request.template_settings
            )
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

"""Sizes of what a client sends, looked at before any work is done with it."""

from lckv.serving.errors import ApiError
from lckv.serving.limits import ServingLimits


def short_enough(text: str, path: str, limits: ServingLimits) -> str:
    """`text`. Raises ApiError if it is too long to be tokenised."""
    check_characters(len(text), path, limits)
    return text


def check_characters(count: int, path: str, limits: ServingLimits) -> None:
    """Raises ApiError for a text that is too long to be tokenised."""
    if count > limits.prompt_characters:
        most = limits.prompt_characters
        raise ApiError(400, f"{path}: {count} characters; at most {most} are allowed.", param=path)


def check_prompt_length(tokens: int, path: str, limits: ServingLimits) -> None:
    """Raises ApiError for a prompt of no tokens or too many."""
    if tokens == 0:
        raise ApiError(400, f"{path} is empty; it must have at least one token.", param=path)
    if tokens > limits.max_prompt_tokens:
        most = limits.max_prompt_tokens
        raise ApiError(400, f"{path}: {tokens} tokens; at most {most} are allowed.", param=path)


def check_count(count: int, most: int, path: str, things: str, *, least: int = 1) -> None:
    """Raises ApiError for too few or too many of something."""
    if not least <= count <= most:
        raise ApiError(400, f"{path}: {count} {things}; {least} to {most} are allowed.", param=path)

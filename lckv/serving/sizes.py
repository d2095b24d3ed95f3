"""Sizes of what a client sends, looked at before any work is done with it."""

from lckv.serving.errors import ApiError
from lckv.serving.limits import ServingLimits


def check_count(count: int, most: int, path: str, things: str, *, least: int = 1) -> None:
    """Raises ApiError for too few or too many of something; `path`: the field that has them."""
    if not least <= count <= most:
        raise ApiError(400, f"{path}: {count} {things}; {least} to {most} are allowed.", param=path)


def check_characters(count: int, path: str, limits: ServingLimits) -> None:
    """Raises ApiError for a text that is too long to be tokenised."""
    check_count(count, limits.prompt_characters, path, "characters", least=0)


def check_tokens(count: int, path: str, limits: ServingLimits) -> None:
    """Raises ApiError for a prompt of no tokens or too many."""
    check_count(count, limits.max_prompt_tokens, path, "tokens")

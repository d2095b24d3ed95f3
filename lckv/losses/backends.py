"""The backends of the loss, which one is chosen, and why."""

from dataclasses import dataclass
from functools import partial

from lckv.errors import UnsupportedError
from lckv.losses import chunked, whole
from lckv.losses.head import TokenLoss

NAMES = ("whole", "chunked")


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    name: str
    reason: str
    token_loss: TokenLoss


def choose(name: str, *, chunk_size: int) -> Choice:
    """The backend `name`, or for "auto" the one that `chunk_size` asks for: tokens at a time, 0: all at once.

    Raises UnsupportedError where an explicitly requested backend cannot serve: there is no fallback.
    """
    if name == "auto":
        asked = "all tokens at once" if chunk_size == 0 else f"{chunk_size} tokens at a time"
        return _choice("chunked" if chunk_size else "whole", asked, chunk_size)
    if name not in NAMES:
        raise UnsupportedError(name, f"the backends are auto, {', '.join(NAMES)}")
    if name == "whole" and chunk_size:
        raise UnsupportedError(
            name, f"it takes all tokens at once, and chunks of {chunk_size} tokens are asked for"
        )
    if name == "chunked" and not chunk_size:
        raise UnsupportedError(name, "it needs the number of tokens of a chunk")
    return _choice(name, "asked for", chunk_size)


def _choice(name: str, reason: str, chunk_size: int) -> Choice:
    if name == "whole":
        return Choice(name, reason, whole.token_loss)
    return Choice(name, reason, partial(chunked.token_loss, chunk_size=chunk_size))

"""The backends of the loss, which one is chosen, and why."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType

import torch

from lckv.errors import UnsupportedError
from lckv.install import why_no_function
from lckv.losses import cut, liger
from lckv.losses.linear_cross_entropy import linear_cross_entropy
from lckv.losses.token_losses import LinearCrossEntropy

NAMES = ("chunked", "liger", "cut", "cut_filtered")
_PACKAGES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "liger-kernel": (liger.MODULE, liger.FUNCTION, "0.8.1"),
        "cut-cross-entropy": (cut.MODULE, cut.FUNCTION, "25.1"),
    }
)
"""Distribution: the module and the function that are used, and the first version that has it."""


@dataclass(frozen=True)
class LossTerms:
    """What the loss is beside the cross-entropy."""

    z_loss: float = 0.0
    """Times the square of the logsumexp of the logits."""

    soft_cap: float | None = None
    """c: logits become c tanh(logits / c)."""


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    name: str
    reason: str
    loss: LinearCrossEntropy
    adds_weight_gradient: bool = True
    """Whether it can add the weight's gradient to a given sum."""

    chunk_size: int = 0
    """Tokens at a time, 0: as memory asks for."""


def choose(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    chunk_size: int = 0,
    terms: LossTerms = LossTerms(),
    ranks: int = 1,
) -> Choice:
    """The backend `name`, or for "auto" liger-kernel where it serves, else this project's own chunks.

    `chunk_size`: tokens at a time, 0: as memory asks for. `ranks`: that share the vocabulary.

    Raises UnsupportedError where an explicitly requested backend cannot serve: there is no fallback.
    """
    requested = f"asked for {name}"
    if name in ("liger", "auto"):
        obstacle = why_not_liger(device, terms)
        if obstacle is None:
            return _by_chunks("liger", requested, chunk_size, terms)
        if name == "liger":
            raise UnsupportedError(name, obstacle)
        return _by_chunks("chunked", f"{requested}: {obstacle}", chunk_size, terms)
    if name == "chunked":
        return _by_chunks(name, requested, chunk_size, terms)
    if name not in NAMES:
        raise UnsupportedError(repr(name), f"the backends are auto, {', '.join(NAMES)}")
    obstacle = why_not_cut(device, dtype, terms, ranks, chunk_size)
    if obstacle is not None:
        raise UnsupportedError(name, obstacle)
    kernel = getattr(importlib.import_module(cut.MODULE), cut.FUNCTION)
    loss = partial(
        cut.cut_cross_entropy, soft_cap=terms.soft_cap, filtered=name == "cut_filtered", kernel=kernel
    )
    return Choice(name, requested, loss, adds_weight_gradient=False)


def _by_chunks(name: str, reason: str, chunk_size: int, terms: LossTerms) -> Choice:
    loss = partial(linear_cross_entropy, **vars(terms), chunk_size=chunk_size)
    if name == "liger":
        kernel = getattr(importlib.import_module(liger.MODULE), liger.FUNCTION)
        loss = partial(loss, kernel=partial(liger.chunk_loss, kernel=kernel))
    return Choice(name, reason, loss, chunk_size=chunk_size)


def why_not_liger(device: torch.device, terms: LossTerms) -> str | None:
    """What keeps liger-kernel from serving; None if nothing does."""
    if terms.z_loss or terms.soft_cap is not None:
        return "the vocabulary-parallel loss of liger-kernel has neither z-loss nor soft-cap"
    if device.type != "cuda":
        return f"liger-kernel needs CUDA tensors, the model is on {device.type}"
    return why_no_package("liger-kernel")


def why_not_cut(
    device: torch.device, dtype: torch.dtype, terms: LossTerms, ranks: int, chunk_size: int
) -> str | None:
    """What keeps cut-cross-entropy from serving; None if nothing does."""
    if ranks > 1:
        return f"cut-cross-entropy needs the whole vocabulary on a rank, and {ranks} ranks share it"
    if terms.z_loss:
        return "cut-cross-entropy has no z-loss"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"cut-cross-entropy takes float16 and bfloat16, not {dtype}"
    if chunk_size:
        return f"cut-cross-entropy makes tiles of its own, and chunks of {chunk_size} tokens are asked for"
    if device.type != "cuda":
        return f"cut-cross-entropy needs CUDA tensors, the model is on {device.type}"
    return why_no_package("cut-cross-entropy")


@cache
def why_no_package(distribution: str) -> str | None:
    """What is wrong with an installed package of `_PACKAGES`; None if nothing is."""
    return why_no_function(distribution, *_PACKAGES[distribution])

"""The attention backends, which one is chosen, and why."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from lckv.attention import flash, reference, sdpa
from lckv.errors import UnsupportedError

Attend = Callable[..., Tensor]
"""attend(query, key, value, visibility, *, scale, dropout, key_bias) as in `reference.attend`."""

NAMES = ("sdpa", "flash", "reference")


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    name: str
    reason: str
    attend: Attend


def why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps flash-attn from serving these tensors; None if nothing does."""
    if device.type != "cuda":
        return f"flash-attn needs CUDA tensors, the model is on {device.type}"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install 'lckv-megatron[gpu]')"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {dtype}"
    if head_dim > 256:
        return f"flash-attn takes heads of at most 256 channels, not {head_dim}"
    return None


@cache
def choose(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The backend `name`, or for "auto" the fastest that serves these tensors.

    Raises UnsupportedError where an explicitly requested backend cannot serve: there is no fallback.
    """
    obstacle = why_not_flash(device, dtype, head_dim)
    requested = f"asked for {name}"
    if name == "flash" and obstacle is not None:
        raise UnsupportedError(name, obstacle)
    if name == "flash" or (name == "auto" and obstacle is None):
        kernel = importlib.import_module("flash_attn")
        return Choice("flash", requested, partial(flash.attend, kernel=kernel))
    if name == "sdpa":
        return Choice("sdpa", requested, sdpa.attend)
    if name == "auto":
        return Choice("sdpa", f"{requested}: {obstacle}", sdpa.attend)
    if name == "reference":
        return Choice("reference", requested, reference.attend)
    raise UnsupportedError(repr(name), f"the backends are auto, {', '.join(NAMES)}")

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
from lckv.install import INSTALL_GPU

Attend = Callable[..., Tensor]
"""attend(query, key, value, visibility, *, scale, dropout, key_bias) as in `reference.attend`."""

_FLASH_FUNCTIONS = {
    "flash_attn": ("flash_attn_func", "flash_attn_varlen_func"),
    "flash_attn.flash_attn_interface": ("_flash_attn_forward", "_flash_attn_backward"),
}
"""What is used of flash-attn."""

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
    obstacle = why_no_flash_package()
    if obstacle is not None:
        return obstacle
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {dtype}"
    if head_dim > 256:
        return f"flash-attn takes heads of at most 256 channels, not {head_dim}"
    return None


@cache
def why_no_flash_package() -> str | None:
    """What is wrong with the installed flash-attn; None if nothing is.

    Functions are looked for, not names of packages: FlashAttention 4 shares the name flash_attn and has none
    of them, and a build for another torch cannot be imported.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return f"the package flash-attn is not installed ({INSTALL_GPU})"
    for module, functions in _FLASH_FUNCTIONS.items():
        try:
            loaded = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"flash-attn cannot be imported: {error}"
        for function in functions:
            if not hasattr(loaded, function):
                return (
                    f"the package flash_attn has no {module}.{function}, which flash-attn 2.7 and newer has"
                )
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

"""The attention backends, which one is chosen, and why."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from lckv.attention import flash, flash3, reference, sdpa
from lckv.attention.aten_pairs import choose_pair
from lckv.attention.flash_attn_pair import FlashAttnPair
from lckv.attention.flash_pair import FlashPair
from lckv.errors import UnsupportedError
from lckv.install import INSTALL_GPU

Attend = Callable[..., Tensor]
"""attend(query, key, value, visibility, *, scale, dropout, key_bias) as in `reference.attend`."""

PairFor = Callable[[Tensor], FlashPair]
"""The kernels for parts of an attention whose queries are like the tensor."""

_FLASH_FUNCTIONS = {
    "flash_attn": ("flash_attn_func", "flash_attn_varlen_func"),
    "flash_attn.flash_attn_interface": (
        "_flash_attn_forward", "_flash_attn_backward",
        "_flash_attn_varlen_forward", "_flash_attn_varlen_backward",
    ),
}  # fmt: skip
"""What is used of flash-attn."""
_FLASH3_MODULE = "flash_attn_interface"
_FLASH3_FUNCTIONS = (
    "flash_attn_func", "flash_attn_varlen_func", "_flash_attn_forward", "_flash_attn_backward"
)  # fmt: skip
"""What is used of FlashAttention 3."""
_HOPPER = 9
"""Compute capability of H100 and H200, the major number."""

NAMES = ("sdpa", "flash", "flash3", "reference")


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    name: str
    reason: str
    attend: Attend
    pair: PairFor | None = None
    """None: it makes no part of an attention, only the whole."""


def why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps flash-attn from serving these tensors; None if nothing does."""
    if device.type != "cuda":
        return f"flash-attn needs CUDA tensors, the model is on {device.type}"
    return why_no_flash_package() or _why_not_tensors("flash-attn", dtype, head_dim)


def why_not_flash3(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps FlashAttention 3 from serving these tensors; None if nothing does."""
    if device.type != "cuda":
        return f"FlashAttention 3 needs CUDA tensors, the model is on {device.type}"
    obstacle = why_no_flash3_package()
    if obstacle is None and torch.cuda.get_device_capability(device)[0] != _HOPPER:
        obstacle = f"FlashAttention 3 is for Hopper, this is {torch.cuda.get_device_name(device)}"
    return obstacle or _why_not_tensors("FlashAttention 3", dtype, head_dim)


def _why_not_tensors(package: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{package} takes float16 and bfloat16, not {dtype}"
    if head_dim > 256:
        return f"{package} takes heads of at most 256 channels, not {head_dim}"
    return None


@cache
def why_no_flash3_package() -> str | None:
    """What is wrong with the installed FlashAttention 3, which is built from the folder hopper of
    flash-attn's sources; None if nothing is."""
    try:
        loaded = importlib.import_module(_FLASH3_MODULE)
    except (ImportError, OSError, RuntimeError) as error:
        return f"FlashAttention 3 cannot be imported: {error}"
    missing = [function for function in _FLASH3_FUNCTIONS if not hasattr(loaded, function)]
    return f"{_FLASH3_MODULE} has no {', '.join(missing)}" if missing else None


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
    requested, tensors = f"asked for {name}", (device, dtype, head_dim)
    obstacles: list[str] = []
    for backend, why_not in (("flash3", why_not_flash3), ("flash", why_not_flash)):
        if name not in (backend, "auto"):
            continue
        obstacle = why_not(*tensors)
        if obstacle is None:
            return _choice_of(backend, "; ".join([requested, *obstacles]))
        if name == backend:
            raise UnsupportedError(name, obstacle)
        if device.type == "cuda" or not obstacles:
            obstacles.append(obstacle)
    if name == "sdpa":
        return Choice("sdpa", requested, sdpa.attend, choose_pair)
    if name == "auto":
        return Choice("sdpa", f"{requested}: {'; '.join(obstacles)}", sdpa.attend, choose_pair)
    if name == "reference":
        return Choice("reference", requested, reference.attend)
    raise UnsupportedError(repr(name), f"the backends are auto, {', '.join(NAMES)}")


def _choice_of(name: str, reason: str) -> Choice:
    if name == "flash":
        return flash_choice(reason, importlib.import_module("flash_attn"))
    kernel = importlib.import_module(_FLASH3_MODULE)
    attend = partial(flash3.attend, kernel=kernel)
    return Choice(name, reason, attend, lambda query: flash3.FlashAttn3Pair(kernel))


def flash_choice(reason: str, kernel: flash.FlashAttn) -> Choice:
    """flash-attn, whose module is `kernel`."""
    attend = partial(flash.attend, kernel=kernel)
    return Choice("flash", reason, attend, lambda query: FlashAttnPair(kernel.flash_attn_interface))

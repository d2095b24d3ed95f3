"""Numbers of weights, activations, keys and values: their names and sizes. Torch is loaded only where a dtype
of its own is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lckv.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

DTYPE_NAMES = tuple(_BYTES)
"""As PyTorch calls them."""


def bytes_of(dtype: str) -> int:
    """Size of one number. Raises UnsupportedError for an unknown name."""
    return _BYTES[_known(dtype)]


def torch_dtype(dtype: str) -> "torch.dtype":
    """PyTorch's dtype of that name. Raises UnsupportedError for an unknown name."""
    import torch

    return getattr(torch, _known(dtype))


def name_of(dtype: "torch.dtype") -> str:
    """The name of PyTorch's dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def exact_products() -> Iterator[None]:
    """While the context is open, products of float32 numbers are float32. Without, they may be TF32: NVIDIA's
    containers ask for that by an environment variable."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _known(dtype: str) -> str:
    if dtype not in _BYTES:
        raise UnsupportedError(dtype, f"numbers are {', '.join(DTYPE_NAMES)}")
    return dtype

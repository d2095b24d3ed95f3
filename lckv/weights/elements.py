"""The numbers of tensors, straight from files."""

from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lckv.weights.tensors import CHUNK_BYTES


def fill(file: BinaryIO, target: Tensor) -> None:
    """Fills a contiguous tensor with the next bytes of a file.

    Raises EOFError where the file ends before.
    """
    missing = memoryview(cast(Any, target.reshape(-1).view(torch.uint8).numpy()))
    while missing:
        count = cast(Any, file).readinto(missing[:CHUNK_BYTES])
        if not count:
            raise EOFError(f"it ends {len(missing)} bytes too early")
        missing = missing[count:]

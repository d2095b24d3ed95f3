"""Files by torch.save, of which nothing but tensors is unpickled."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from lckv.errors import ModelError
from lckv.weights.tensors import TensorInfo


class PickledTensor:
    """A tensor that lies mapped in a pickled file."""

    def __init__(self, tensor: Tensor) -> None:
        self.info = TensorInfo(tuple(tensor.shape), tensor.dtype)
        self._tensor = tensor

    def read(self, rows: slice | None = None) -> Tensor:
        """A copy of the tensor, or of its rows start:stop."""
        part = self._tensor if rows is None else self._tensor[rows]
        return part.clone(memory_format=torch.contiguous_format)


def open_pickle(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a file by their names. They are mapped, not read.

    Raises ModelError where the file is damaged or holds anything but tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{path} is truncated, holds more than tensors, or is older than PyTorch 1.6 ({reason}). Take "
            "the model in safetensors."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ModelError(f"{path} holds no dictionary of tensors; it must be the state of a model.")
    return {str(name): PickledTensor(tensor) for name, tensor in content.items()}

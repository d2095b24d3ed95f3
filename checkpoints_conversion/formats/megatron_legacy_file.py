"""One rank's file of a checkpoint in Megatron's older layout.

It is read as data. Of objects that are no tensors, a few that such files hold are known; a file that names
any other is refused.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_conversion.errors import ConversionError
from lckv.weights.pickled_data import ForbiddenNameError, Made
from lckv.weights.pickled_file import READING_ERRORS, read_torch_file
from lckv.weights.pickled_tensor import PickledTensor

FILE_NAME = "model_optim_rng.pt"

_ARGUMENTS = "argparse.Namespace"
_KNOWN = (
    _ARGUMENTS,
    # Of no use here: enumerations among the arguments, random states, FP8 scaling.
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.ModelType",
    "megatron.model.enums.ModelType",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",
    "_io.BytesIO",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "pathlib.PosixPath",
    "signal.Signals",
    "torch.Size",
    "torch.device",
)


class RankFile:
    """The file of one rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = _load(path)
        model = self.content.get("model")
        if not isinstance(model, Mapping):
            raise ConversionError(
                f"{self.path}: it has no weights under `model`; with an interleaved pipeline (model0, ...) "
                "they are not converted."
            )
        self.tensors = dict(_flatten(model, path))
        """By dotted names."""

    @property
    def arguments(self) -> argparse.Namespace | None:
        """Those of the run, None where there are none."""
        args = self.content.get("args")
        if not isinstance(args, Made) or args.name != _ARGUMENTS or not isinstance(args.state, Mapping):
            return None
        return argparse.Namespace(**{str(name): value for name, value in args.state.items()})

    def copy_rows(self, key: str, first: int, start: int, stop: int, target: Tensor) -> None:
        """Copies rows of a tensor, counted from its row `first`, into a tensor of their shape."""
        try:
            self.tensors[key].copy_rows(first + start, first + stop, target)
        except READING_ERRORS as error:
            raise ConversionError(f"{self.path}: {key} cannot be read: {error}.") from error


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = read_torch_file(path, _KNOWN)
    except ForbiddenNameError as error:
        raise ConversionError(
            f"{path} is refused: it names {error.name}, which is not part of a model. Nothing of it was run. "
            "Take the file from where the model was published."
        ) from error
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except READING_ERRORS as error:
        raise ConversionError(
            f"{path} cannot be read; it is damaged, or not what torch.save has written: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    return content


def _flatten(model: Mapping[Any, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, PickledTensor]]:
    """The tensors of nested dictionaries under dotted names."""
    for name, value in model.items():
        key = f"{prefix}{name}"
        if key.endswith("_extra_state"):  # Transformer Engine's FP8 scaling
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, path, f"{key}.")
        elif isinstance(value, PickledTensor):
            yield key, value
        else:
            kind = value.name if isinstance(value, Made) else type(value).__name__
            raise ConversionError(f"{path}: {key} among the weights is a {kind}, not a tensor.")

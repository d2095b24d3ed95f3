"""One rank's file of a checkpoint in Megatron's older layout.

It is read with torch's weights_only unpickler. Of classes that this one does not know, a few that such files
hold stand for nothing here; a file that names any other is refused.
"""

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.errors import ConversionError

FILE_NAME = "model_optim_rng.pt"
REMAP_BYTES = 256 * 2**20
"""After reading so much of a file it is mapped anew, so that what has been read does not stay in memory."""


class _Ignored:
    """Stands for an object of no use here: an enumeration among the arguments,
    a random state, FP8 scaling. Keeps nothing."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing."""


_STAND_INS = (
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
    "_io.BytesIO",
    "pathlib.PosixPath",
    "signal.Signals",
)


class RankFile:
    """The file of one rank, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._load()

    def copy_rows(self, key: str, first: int, start: int, stop: int, target: Tensor) -> None:
        """Copies rows of a tensor, counted from its row `first`, into a tensor of their shape."""
        if self._copied_bytes > REMAP_BYTES:
            self._load()
        target.copy_(self.tensors[key][first + start : first + stop])
        self._copied_bytes += target.nbytes

    def _load(self) -> None:
        self._copied_bytes = 0
        self.content = _load(self.path)
        model = self.content.get("model")
        if not isinstance(model, Mapping):
            raise ConversionError(
                f"{self.path}: it has no weights under `model`; with an interleaved pipeline (model0, ...) "
                "they are not converted."
            )
        self.tensors = dict(_flatten(model, self.path))


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with _only_known_classes():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ConversionError(
            f"{path} is refused: it names {name[1] if name else 'objects'}, which is not part of a model. "
            "Nothing of it was run. Take the file from where the model was published."
        ) from error
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} cannot be read; it is damaged, or not what torch.save has written: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    return content


@contextmanager
def _only_known_classes() -> Iterator[None]:
    """The unpickler knows the stand-ins, and nothing that other packages have made known to it."""
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        stand_ins: list[Any] = [(_Ignored, name) for name in _STAND_INS]
        torch.serialization.add_safe_globals([argparse.Namespace, *stand_ins])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)


def _flatten(model: Mapping[Any, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries under dotted names."""
    for name, value in model.items():
        key = f"{prefix}{name}"
        if key.endswith("_extra_state"):  # Transformer Engine's FP8 scaling
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, path, f"{key}.")
        elif isinstance(value, Tensor):
            yield key, value
        else:
            raise ConversionError(
                f"{path}: {key} among the weights is a {type(value).__name__}, not a tensor."
            )

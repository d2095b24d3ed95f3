"""Folders of Hugging Face models: config.json, and weights in one file or in shards with an index."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.formats.safetensors_file import (
    StoredTensor,
    open_safetensors,
    write_safetensors_file,
)
from checkpoints_conversion.tensors import ConversionError, TensorInfo, TensorSource
from megatron_ext.atomic import move, write_file

CONFIG_NAME = "config.json"
_INDEX = ".index.json"
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_PICKLE_ENDINGS = (".bin", ".pt", ".pth")
MAX_SHARD_BYTES = 5 * 10**9
"""Size that a file of weights does not exceed, but by a single tensor."""


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json; raises ConversionError where there is none or it is not a JSON
    object."""
    content = _read_json(folder / CONFIG_NAME)
    if not isinstance(content, dict):
        raise ConversionError(
            f"{folder / CONFIG_NAME} holds {type(content).__name__}; it must be a JSON object."
        )
    return content


class HuggingFaceFolder:
    """The weights of a folder, under the names that they have there. Nothing is in memory until it is
    read."""

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        """Looks for model.safetensors or its index, and with `allow_pickle` for pytorch_model.bin.

        Raises ConversionError where there are no weights, only pickled ones without `allow_pickle`, or where
        a file is missing, truncated, or lacks a tensor that the index says it has.
        """
        self.path = path
        name = self._find(allow_pickle)
        index = path / (name + _INDEX)
        shards = _shards(index) if index.exists() else {name: ()}
        self.files = tuple(shards)
        """Names of the files with the weights."""
        opener = open_safetensors if name == _SAFETENSORS else _open_pickle
        self._tensors: dict[str, StoredTensor | _PickledTensor] = {}
        for shard, indexed in shards.items():
            file = path / shard
            if not file.exists():
                raise ConversionError(
                    f"{file} is missing, but {index.name} names it. Fetch it, or all of the model again."
                )
            found = opener(file)
            absent = [tensor for tensor in indexed if tensor not in found]
            if absent:
                raise ConversionError(
                    f"{file} lacks {len(absent)} tensors that {index.name} says it has, such as {absent[0]}. "
                    "Fetch the model again."
                )
            self._tensors |= {
                tensor: stored
                for tensor, stored in found.items()
                if tensor in indexed or tensor not in self._tensors
            }

    def _find(self, allow_pickle: bool) -> str:
        """The name of the weights' file, whether or not they are in shards."""
        if not self.path.is_dir():
            raise ConversionError(
                f"{self.path} is not a folder; give that of a model, with config.json and weights."
            )
        for name in (_SAFETENSORS, _PICKLE) if allow_pickle else (_SAFETENSORS,):
            if (self.path / name).exists() or (self.path / (name + _INDEX)).exists():
                return name
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLE_ENDINGS)
        if pickles:
            raise ConversionError(
                f"{self.path} has no {_SAFETENSORS}, only pickled weights ({', '.join(pickles[:3])}). "
                "Pickles can run programs: take "
                f"the model in safetensors, or allow pickles to read {_PICKLE} (nothing but tensors will be "
                "unpickled)."
            )
        raise ConversionError(
            f"{self.path} has neither {_SAFETENSORS} nor {_SAFETENSORS}{_INDEX}; these hold the weights."
        )

    def __str__(self) -> str:
        return str(self.path)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name."""
        return {name: stored.info for name, stored in self._tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop."""
        return self._tensors[name].read(rows)


def _shards(index: Path) -> dict[str, list[str]]:
    """The files that an index names, with the tensors that it says they hold."""
    content = _read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ConversionError(
            f"{index}: weight_map is {names!r}; it must say for every tensor in which file it is."
        )
    shards: dict[str, list[str]] = {}
    for tensor, file in names.items():
        if Path(file).name != file:
            raise ConversionError(
                f"{index}: {tensor} is in {file!r}; only files of the same folder are read."
            )
        shards.setdefault(file, []).append(tensor)
    return shards


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}.") from error


class _PickledTensor:
    """A tensor that lies mapped in a pickled file."""

    def __init__(self, tensor: Tensor) -> None:
        self.info = TensorInfo(tuple(tensor.shape), tensor.dtype)
        self._tensor = tensor

    def read(self, rows: slice | None = None) -> Tensor:
        """A copy of the tensor, or of its rows start:stop."""
        part = self._tensor if rows is None else self._tensor[rows]
        return part.clone(memory_format=torch.contiguous_format)


def _open_pickle(path: Path) -> dict[str, _PickledTensor]:
    """The tensors of a file by torch.save; nothing but tensors is unpickled, and they are mapped, not
    read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(
            f"{path} is truncated, holds more than tensors, or is older than PyTorch 1.6 ({reason}). Take "
            "the model in safetensors."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ConversionError(f"{path} holds no dictionary of tensors; it must be the state of a model.")
    return {str(name): _PickledTensor(tensor) for name, tensor in content.items()}


def write_safetensors(
    folder: Path, source: TensorSource, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[str, ...]:
    """Writes the tensors of `source` to model.safetensors, or to shards with an index, and returns the names
    of the files with weights.

    Each is read when it is written, in slices of rows. The files appear under their names when all are whole;
    after an error there are none.
    """
    shards = _plan(source.infos(), max_shard_bytes)
    temporary = {name: folder / f".{name}.tmp" for name in shards}
    try:
        for name, tensors in shards.items():
            write_safetensors_file(temporary[name], source, tensors)
        for name, path in temporary.items():
            move(path, folder / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    if len(shards) > 1:
        total = sum(info.nbytes for info in source.infos().values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
        }
        write_file(folder / (_SAFETENSORS + _INDEX), json.dumps(index, indent=2).encode())
    return tuple(shards)


def _plan(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, by the file's name."""
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, info in infos.items():
        if groups[-1] and info.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= info.nbytes
    if len(groups) == 1:
        return {_SAFETENSORS: groups[0]}
    stem = _SAFETENSORS.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)
    }

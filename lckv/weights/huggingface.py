"""Folders of Hugging Face models: config.json, and weights in one file or in shards with an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lckv.errors import ModelError
from lckv.plain_files import is_plain_name
from lckv.weights.json_file import read_json, read_json_object
from lckv.weights.pickled_file import open_pickle
from lckv.weights.pickled_tensor import PickledTensor
from lckv.weights.safetensors_file import StoredTensor, open_safetensors
from lckv.weights.tensors import TensorInfo

CONFIG_NAME = "config.json"
SAFETENSORS_NAME, INDEX_SUFFIX = "model.safetensors", ".index.json"
_PICKLE = "pytorch_model.bin"
_PICKLE_ENDINGS = (".bin", ".pt", ".pth")


def read_config_file(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json.

    Raises ModelError where there is none or it is not a JSON object.
    """
    return read_json_object(folder / CONFIG_NAME)


class HuggingFaceFolder:
    """The weights of a folder, under the names that they have there.
    Nothing is in memory until it is read."""

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        """Looks for model.safetensors or its index, and with `allow_pickle` for pytorch_model.bin.

        Raises ModelError where there are no weights, only pickled ones without `allow_pickle`, or where
        a file is missing, truncated, or lacks a tensor that the index says it has.
        """
        self.path = path
        name = self._find(allow_pickle)
        index = path / (name + INDEX_SUFFIX)
        shards = _shards(index) if index.exists() else {name: ()}
        self.files = tuple(shards)
        """Names of the files with the weights."""
        opener = open_safetensors if name == SAFETENSORS_NAME else open_pickle
        self._tensors: dict[str, StoredTensor | PickledTensor] = {}
        for shard, indexed in shards.items():
            file = path / shard
            if not file.exists():
                raise ModelError(
                    f"{file} is missing, but {index.name} names it. Fetch it, or all of the model again."
                )
            stored = opener(file)
            absent = [tensor for tensor in indexed if tensor not in stored]
            if absent:
                raise ModelError(
                    f"{file} lacks {len(absent)} tensors that {index.name} says it has, such as {absent[0]}. "
                    "Fetch the model again."
                )
            self._tensors |= {
                tensor: place
                for tensor, place in stored.items()
                if tensor in indexed or tensor not in self._tensors
            }

    def _find(self, allow_pickle: bool) -> str:
        """The name of the weights' file, whether or not they are in shards."""
        if not self.path.is_dir():
            raise ModelError(
                f"{self.path} is not a folder; give that of a model, with config.json and weights."
            )
        for name in (SAFETENSORS_NAME, _PICKLE) if allow_pickle else (SAFETENSORS_NAME,):
            if (self.path / name).exists() or (self.path / (name + INDEX_SUFFIX)).exists():
                return name
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLE_ENDINGS)
        if pickles:
            raise ModelError(
                f"{self.path} has no {SAFETENSORS_NAME}, only pickled weights ({', '.join(pickles[:3])}). "
                "Pickles can run programs: take the model in safetensors, or convert it, with "
                f"--allow-pickle to allow pickles such as {_PICKLE} (nothing but tensors is unpickled)."
            )
        raise ModelError(
            f"{self.path} has neither {SAFETENSORS_NAME} nor {SAFETENSORS_NAME}{INDEX_SUFFIX}; these hold "
            "the weights."
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
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ModelError(
            f"{index}: weight_map is {names!r}; it must say for every tensor in which file it is."
        )
    shards: dict[str, list[str]] = {}
    for tensor, file in names.items():
        if not is_plain_name(file):
            raise ModelError(f"{index}: {tensor} is in {file!r}; only files of the same folder are read.")
        shards.setdefault(file, []).append(tensor)
    return shards

"""Files by torch.save: a zip archive with one pickle, and the numbers of each tensor beside it.

PyTorch's own reader calls what the pickle says, from a list of functions, some of which take any amount of
memory. Here the pickle is read as data (`pickled_data.py`), and a tensor is a place in the file, which holds
as many numbers as the tensor has.
"""

import math
import os
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch

from lckv.errors import ModelError
from lckv.plain_files import open_plain
from lckv.weights.file_part import FilePart
from lckv.weights.pickled_data import ForbiddenNameError, Made, Name, Persistent, read_pickle
from lckv.weights.pickled_tensor import PickledTensor, contiguous_strides
from lckv.weights.tensors import TensorInfo

READING_ERRORS = (
    UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    OverflowError,
)
"""What `read_torch_file` and reading its tensors raise."""

MAX_PICKLE_BYTES = 64 * 2**20
_TENSOR, _TENSOR_OF_DTYPE, _PARAMETER = (
    f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter")
)
_UNTYPED = "torch.storage.UntypedStorage"
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    _UNTYPED: torch.uint8,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NAMES = frozenset({_TENSOR, _TENSOR_OF_DTYPE, _PARAMETER, *_STORAGES, *_DTYPES})
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of an archive's entry: the lengths of its name and of its extra field, which come before the content."""
_ENCRYPTED = 1


def read_torch_file(
    path: Path, names: Collection[str] = (), *, offset: int = 0, length: int | None = None
) -> Any:
    """What torch.save has written into a file, or into `length` bytes of it from `offset` on, as data.
    Tensors are `PickledTensor`s, of which nothing is read.

    Objects other than tensors may have the given dotted `names`, and are `Made`s. Nothing is run. Raises
    ForbiddenNameError (an UnpicklingError) for another name, and READING_ERRORS where the file is damaged, or
    holds less than it says.
    """
    with open_plain(path, buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise EOFError(f"it ends at byte {size}, before byte {offset + length}")
        archive = _Archive(path, file, offset, length)
        content = read_pickle(archive.pickle(), _NAMES | frozenset(names))
        return _mapped(content, lambda part: _value(part, archive))


class _Archive:
    """An archive of torch.save's, whose entries lie in the file as they are."""

    def __init__(self, path: Path, file: BinaryIO, offset: int, length: int) -> None:
        self._path, self._file, self._offset, self._length = path, file, offset, length
        self._zip = zipfile.ZipFile(cast(Any, FilePart(file, offset, length)))
        entries = self._zip.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch.save never does")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > length:
            raise zipfile.BadZipFile("its entries are larger than the file")
        pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise zipfile.BadZipFile("it is not what torch.save writes since PyTorch 1.6")
        self._pickle = pickles[0]
        self._folder = self._pickle.filename.partition("/")[0]
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise zipfile.BadZipFile("it has several entries of one name")
        order = self._entries.get(f"{self._folder}/byteorder")
        if order is not None and self._zip.read(order) != b"little":
            raise zipfile.BadZipFile("its numbers are not little-endian")

    def pickle(self) -> bytes:
        if self._pickle.file_size > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile(
                f"its pickle has {self._pickle.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read"
            )
        return self._zip.read(self._pickle)

    def tensor(self, made: Made) -> PickledTensor:
        """The tensor that one of torch's functions would make."""
        if made.name == _PARAMETER:
            inner = made.arguments[0]
            if not isinstance(inner, Made) or inner.name == _PARAMETER:
                raise UnpicklingError("a parameter is no tensor")
            return self.tensor(inner)
        storage, first, shape, strides = made.arguments[:4]
        if not isinstance(storage, Persistent):
            raise UnpicklingError("a tensor has no numbers")
        kind, key = _storage(storage.reference)
        dtype = _STORAGES[kind]
        if made.name == _TENSOR_OF_DTYPE:
            dtype = _DTYPES[_name(made.arguments[6])]
        shape, strides = _whole_numbers(shape), _whole_numbers(strides)
        (first,) = _whole_numbers((first,))
        if len(shape) != len(strides):
            raise UnpicklingError("a tensor has more strides than axes")
        span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        begin, bytes_there = self._numbers(key)
        if max(first + span, math.prod(shape)) * dtype.itemsize > bytes_there:
            raise UnpicklingError(f"a tensor of shape {list(shape)[:8]} has more numbers than the file holds")
        contiguous = span == math.prod(shape) and (span == 0 or _is_dense(shape, strides))
        strides = contiguous_strides(shape) if contiguous else strides
        return PickledTensor(
            self._path, TensorInfo(shape, dtype), strides, begin + first * dtype.itemsize, span
        )

    def _numbers(self, key: str) -> tuple[int, int]:
        """Where in the file the numbers of a tensor begin, and how many bytes they are."""
        entry = self._entries[f"{self._folder}/data/{key}"]
        self._file.seek(self._offset + entry.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        begin = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if begin + entry.file_size > self._length:
            raise EOFError(f"it ends before the last of {entry.filename}")
        return self._offset + begin, entry.file_size


def _mapped(part: Any, change: Callable[[Any], Any]) -> Any:
    """The same data with other leaves. What was one object stays one: a state that is saved again is then
    equal to the last bit. How deep it is nested, `read_pickle` has bounded."""
    known: dict[int, Any] = {}

    def of(part: Any) -> Any:
        if id(part) not in known:
            known[id(part)] = mapped(part)
        return known[id(part)]

    def mapped(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: of(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(map(of, part))
        if isinstance(part, Made) and part.name not in _NAMES:
            return Made(part.name, part.arguments, of(part.state))
        return change(part)

    return of(part)


def _value(part: Any, archive: _Archive) -> Any:
    if isinstance(part, Name) and part.name in _DTYPES:
        return _DTYPES[part.name]
    if isinstance(part, Made):
        if part.name not in (_TENSOR, _TENSOR_OF_DTYPE, _PARAMETER):
            raise UnpicklingError(f"it calls {part.name}")
        return archive.tensor(part)
    if isinstance(part, Name | Persistent):
        raise UnpicklingError("it holds a name, or numbers that are no tensor")
    return part


def _storage(reference: Any) -> tuple[str, str]:
    """Name of the class and key of a tensor's numbers."""
    if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
        raise UnpicklingError("a tensor's numbers are in no storage")
    kind, key = _name(reference[1]), reference[2]
    if kind not in _STORAGES or not isinstance(key, str):
        raise UnpicklingError(f"a tensor's numbers are in {kind}")
    return kind, key


def _name(part: Any) -> str:
    if not isinstance(part, Name):
        raise UnpicklingError("something has no name where one is needed")
    return part.name


def _whole_numbers(part: Any) -> tuple[int, ...]:
    """Sizes or places, none of which is below 0 or beyond what torch counts with."""
    if not isinstance(part, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in part):
        raise UnpicklingError("a tensor's sizes are no whole numbers")
    return part


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether rows lie behind one another; the stride of an axis of one entry says nothing."""
    wanted = contiguous_strides(shape)
    return all(n == 1 or step == right for n, step, right in zip(shape, strides, wanted, strict=True))


def open_pickle(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a file by their names. Nothing of them is read.

    Raises ModelError where the file is damaged or holds anything but tensors.
    """
    try:
        content = read_torch_file(path)
    except ForbiddenNameError as error:
        raise ModelError(
            f"{path} holds more than tensors ({error}). Nothing of it was run. Take the model in safetensors."
        ) from error
    except READING_ERRORS as error:
        raise ModelError(
            f"{path} is truncated, holds more than tensors, or is older than PyTorch 1.6 ({error}). Take "
            "the model in safetensors."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(part, PickledTensor) for part in content.values()):
        raise ModelError(f"{path} holds no dictionary of tensors; it must be the state of a model.")
    return {str(name): tensor for name, tensor in content.items()}


def load_tensors(part: Any) -> Any:
    """The same data with the tensors themselves, those that are no `PickledTensor` as they are.

    Raises EOFError, where they have more numbers together than their file has bytes, and what reading raises.
    """
    tensors = list(_tensors_in(part))
    if tensors and sum(tensor.info.nbytes for tensor in tensors) > os.path.getsize(tensors[0].path):
        raise EOFError("its tensors are larger than the file")
    return _mapped(part, lambda leaf: leaf.read() if isinstance(leaf, PickledTensor) else leaf)


def _tensors_in(part: Any) -> Iterator[PickledTensor]:
    if isinstance(part, PickledTensor):
        yield part
    elif isinstance(part, dict | list | tuple):
        for value in part.values() if isinstance(part, dict) else part:
            yield from _tensors_in(value)

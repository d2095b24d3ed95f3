"""safetensors files, read and written in pieces.

The library opens and checks them; the bytes are read and written here, because the library's reader maps the
whole file into memory and its writer takes all tensors at once. The format: eight bytes with the header's
length, a JSON header with {name: {dtype, shape, data_offsets}}, and the tensors behind one another without
gaps.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_conversion.tensors import (
    WEIGHT_DTYPES,
    ConversionError,
    TensorInfo,
    TensorSource,
    row_chunks,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_PICKLES = (b"PK\x03\x04", b"\x80")
"""How files begin that torch.save and pickle write."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    info: TensorInfo
    offset: int
    """Of its first byte in the file."""

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop. Raises ConversionError where the file has become shorter."""
        shape, dtype = self.info.shape, self.info.dtype
        offset = self.offset
        if rows is not None:
            offset += rows.start * (self.info.nbytes // max(shape[0], 1))
            shape = (rows.stop - rows.start, *shape[1:])
        result = torch.empty(shape, dtype=dtype)
        target = result.reshape(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            while target:
                count = file.readinto(target)
                if not count:
                    raise ConversionError(
                        f"{self.path} is truncated: it ends at byte {os.path.getsize(self.path)}. Fetch it "
                        "again."
                    )
                target = target[count:]
        return result


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by their names, in the order in which they lie. Raises ConversionError where it
    is truncated, is no safetensors file, or cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(_LENGTH.size)
            with safe_open(path, framework="pt"):  # checks lengths, offsets and dtypes
                length = _LENGTH.unpack(start)[0]
                header = json.loads(file.read(length))
    except SafetensorError as error:
        if start.startswith(_PICKLES):
            raise ConversionError(
                f"{path} is a pickle, whatever its name says. Pickles can run programs: take the model in "
                "safetensors, or give the file "
                "its true name, such as pytorch_model.bin, and allow pickles."
            ) from error
        raise ConversionError(
            f"{path} is truncated or no safetensors file ({error}). Fetch it again."
        ) from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}.") from error
    header.pop("__metadata__", None)
    data = _LENGTH.size + length
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _stored(path, name, entry, data) for name, entry in entries}


def _stored(path: Path, name: str, entry: dict, data: int) -> StoredTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ConversionError(f"{path}: {name} has the dtype {entry['dtype']}, which is not one of weights.")
    return StoredTensor(path, TensorInfo(tuple(entry["shape"]), dtype), data + entry["data_offsets"][0])


def write_safetensors_file(path: Path, source: TensorSource, names: Sequence[str]) -> None:
    """Writes the named tensors of `source` in slices of rows, each read when it is written, and waits until
    they are on the disk.

    What is at `path` is overwritten; after an error there may be a part of a file.
    """
    infos = source.infos()
    # Wider numbers first, so that every tensor is aligned to its numbers' width.
    ordered = sorted(names, key=lambda name: -infos[name].dtype.itemsize)
    with open(path, "wb") as file:
        file.write(_header({name: infos[name] for name in ordered}))
        for name in ordered:
            for rows in row_chunks(infos[name]):
                chunk = source.read(name, rows)
                _check_chunk(name, chunk, infos[name], rows)
                file.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _header(infos: dict[str, TensorInfo]) -> bytes:
    names = {dtype: name for name, dtype in _DTYPES.items() if dtype in WEIGHT_DTYPES}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": names[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _check_chunk(name: str, chunk: Tensor, info: TensorInfo, rows: slice) -> None:
    expected = (rows.stop - rows.start, *info.shape[1:])
    assert tuple(chunk.shape) == expected and chunk.dtype == info.dtype, (
        name,
        chunk.shape,
        chunk.dtype,
        info,
        rows,
    )

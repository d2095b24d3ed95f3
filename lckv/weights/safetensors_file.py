"""safetensors files, read in pieces.

The library opens and checks them. The bytes are read here, because the library's reader maps the whole file
into memory. The format: eight bytes with the header's length, a JSON header with {name: {dtype, shape,
data_offsets}}, and the tensors behind one another without gaps.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lckv.errors import ModelError
from lckv.plain_files import open_plain
from lckv.weights.elements import fill
from lckv.weights.json_file import JsonError, parse_json
from lckv.weights.tensors import TensorInfo

DTYPES = {
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
"""By their names in headers."""
HEADER_LENGTH = struct.Struct("<Q")
"""Of the first bytes, which say how long the header is."""
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
        """The tensor, or its rows start:stop.

        Raises ModelError where the file has become shorter.
        """
        shape, dtype = self.info.shape, self.info.dtype
        offset = self.offset
        if rows is not None:
            offset += rows.start * (self.info.nbytes // max(shape[0], 1))
            shape = (rows.stop - rows.start, *shape[1:])
        result = torch.empty(shape, dtype=dtype)
        try:
            with open_plain(self.path, buffering=0) as file:
                file.seek(offset)
                fill(file, result)
        except EOFError as error:
            raise ModelError(
                f"{self.path} is truncated: it ends at byte {os.path.getsize(self.path)}. Fetch it again."
            ) from error
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        return result


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by their names, in the order in which they lie.

    Raises ModelError where it is truncated, is no safetensors file, or cannot be read.
    """
    try:
        with open_plain(path) as file:
            start = file.read(HEADER_LENGTH.size)
            with safe_open(path, framework="pt"):  # checks lengths, offsets and dtypes
                length = HEADER_LENGTH.unpack(start)[0]
                header = parse_json(file.read(length))
    except (SafetensorError, JsonError) as error:
        if start.startswith(_PICKLES):
            raise ModelError(
                f"{path} is a pickle, whatever its name says. Pickles can run programs: take the model in "
                "safetensors, or give the file its true name, such as pytorch_model.bin, and allow pickles."
            ) from error
        raise ModelError(f"{path} is truncated or no safetensors file ({error}). Fetch it again.") from error
    except (OSError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"{path} cannot be read: {reason}.") from error
    header.pop("__metadata__", None)
    data = HEADER_LENGTH.size + length
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _stored(path, name, entry, data) for name, entry in entries}


def _stored(path: Path, name: str, entry: dict, data: int) -> StoredTensor:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelError(f"{path}: {name} has the dtype {entry['dtype']}, which is not one of weights.")
    return StoredTensor(path, TensorInfo(tuple(entry["shape"]), dtype), data + entry["data_offsets"][0])

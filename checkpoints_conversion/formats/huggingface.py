"""Weights written as Hugging Face has them: safetensors, in one file or in shards with an index.

The bytes are written here, because the library's writer takes all tensors at once.
The format is told in lckv/weights/safetensors_file.py.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lckv.weights.huggingface import INDEX_SUFFIX, SAFETENSORS_NAME
from lckv.weights.safetensors_file import DTYPES, HEADER_LENGTH
from lckv.weights.tensors import WEIGHT_DTYPES, TensorInfo, TensorSource, row_chunks
from megatron_ext.atomic import move, write_file

MAX_SHARD_BYTES = 5 * 10**9
"""Size that a file of weights does not exceed, but by a single tensor."""
_ALIGNMENT = 8


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
        write_file(folder / (SAFETENSORS_NAME + INDEX_SUFFIX), json.dumps(index, indent=2).encode())
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
        return {SAFETENSORS_NAME: groups[0]}
    stem = SAFETENSORS_NAME.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)
    }


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
    names = {dtype: name for name, dtype in DTYPES.items() if dtype in WEIGHT_DTYPES}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": names[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return HEADER_LENGTH.pack(len(text)) + text


def _check_chunk(name: str, chunk: Tensor, info: TensorInfo, rows: slice) -> None:
    expected = (rows.stop - rows.start, *info.shape[1:])
    assert tuple(chunk.shape) == expected and chunk.dtype == info.dtype, (
        name,
        chunk.shape,
        chunk.dtype,
        info,
        rows,
    )

"""Files of PyTorch's distributed checkpoints, read and written without PyTorch's reader and writer."""

import io
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats import distcp
from checkpoints_conversion.formats.distcp import stored_tensors, write_tensors
from checkpoints_conversion.formats.pieces import join_rows
from lckv.weights.tensors import TensorInfo, row_chunks
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError
from megatron_ext.checkpointing.manifest import hash_files

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # PyTorch's reader and writer say so

TENSORS = {
    "float": torch.arange(35.0).view(7, 5),
    "half": torch.arange(12).view(3, 4).bfloat16(),
    "vector": torch.arange(9, dtype=torch.float16),
}


def infos_of(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def read(folder: Path, key: str, rows: slice | None = None) -> Tensor:
    info, pieces = stored_tensors(folder, read_contents(folder), lambda _: True)[key]
    return join_rows(pieces, info, rows)


@pytest.mark.parametrize(("chunk_bytes", "file_bytes"), [(2**20, 2**20), (40, 2**20), (40, 1500), (1, 1)])
def test_pytorch_reads_what_was_written(tmp_path, monkeypatch, chunk_bytes, file_bytes):
    monkeypatch.setattr(distcp, "row_chunks", partial(row_chunks, chunk_bytes=chunk_bytes))
    monkeypatch.setattr(distcp, "FILE_BYTES", file_bytes)
    files = write_tensors(tmp_path, infos_of(TENSORS), lambda key, rows: TENSORS[key][rows])
    assert files == hash_files(tmp_path, sorted(path.name for path in tmp_path.glob("*.distcp")))
    assert (len(files) > 1) == (file_bytes < 2**20)
    loaded = {key: torch.empty_like(tensor) for key, tensor in TENSORS.items()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    for key, tensor in TENSORS.items():
        assert torch.equal(loaded[key], tensor)
        assert torch.equal(read(tmp_path, key), tensor)
        assert torch.equal(read(tmp_path, key, slice(2, 5)), tensor[2:5])


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path):
    tensor = torch.zeros(100_000)
    write_tensors(tmp_path, {"x": TensorInfo((3,), torch.float32)}, lambda key, rows: tensor[rows])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 3000


def test_reads_what_pytorch_has_written(tmp_path):
    tensors = {
        **TENSORS,
        "columns first": torch.arange(35.0).view(5, 7).t(),
        "part": torch.arange(90.0).view(9, 10)[2:5, 3:],
    }
    dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    for key, tensor in tensors.items():
        assert torch.equal(read(tmp_path, key), tensor)
        assert torch.equal(read(tmp_path, key, slice(1, 3)), tensor[1:3])


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def _replace_record(folder: Path, content: object) -> None:
    """Put something else where the table of contents says that "float" is."""
    record = io.BytesIO()
    torch.save(content, record)
    path = folder / "__0_0.distcp"
    length = path.stat().st_size
    assert len(record.getvalue()) <= length
    # A zip archive is found from its end.
    path.write_bytes(record.getvalue().rjust(length, b"\0"))


@pytest.mark.parametrize("content", [{"a": 1}, torch.zeros(5, 7), torch.zeros(7, 5, dtype=torch.int32), None])
def test_records_that_are_not_the_tensor(tmp_path, content):
    write_tensors(tmp_path, infos_of({"float": TENSORS["float"]}), lambda key, rows: TENSORS[key][rows])
    if content is None:
        (tmp_path / "__0_0.distcp").write_bytes(b"\1" * 2000)
    else:
        _replace_record(tmp_path, content)
    with pytest.raises(ConversionError, match=r"__0_0\.distcp: float cannot be read, the file is damaged"):
        read(tmp_path, "float")


def test_nothing_is_run(tmp_path):
    write_tensors(tmp_path, infos_of({"float": TENSORS["float"]}), lambda key, rows: TENSORS[key][rows])
    _replace_record(tmp_path, _Malicious(f"touch {tmp_path}/run"))
    with pytest.raises(
        ConversionError,
        match=r"float cannot be read, .* holds something else than tensors. Nothing of it was run",
    ):
        read(tmp_path, "float")
    assert not (tmp_path / "run").exists()


def test_a_file_that_ends_too_early(tmp_path):
    write_tensors(tmp_path, infos_of({"float": TENSORS["float"]}), lambda key, rows: TENSORS[key][rows])
    info, pieces = stored_tensors(tmp_path, read_contents(tmp_path), lambda _: True)["float"]
    assert torch.equal(join_rows(pieces, info, slice(0, 1)), TENSORS["float"][:1])
    os.truncate(tmp_path / "__0_0.distcp", 400)
    with pytest.raises(ConversionError, match="too early"):
        join_rows(pieces, info, None)
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp has 400 bytes, and no tensor can be"):
        read(tmp_path, "float")
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(ConversionError, match="No such file"):
        join_rows(pieces, info, None)
    with pytest.raises(DamagedCheckpointError, match="No such file"):
        read(tmp_path, "float")


def test_tables_of_contents_that_do_not_fit(tmp_path):
    write_tensors(tmp_path, infos_of({"float": TENSORS["float"]}), lambda key, rows: TENSORS[key][rows])
    contents = read_contents(tmp_path)
    places, contents.storage_data = contents.storage_data, {}
    with pytest.raises(ConversionError, match="does not say where float is"):
        stored_tensors(tmp_path, contents, lambda _: True)
    contents.storage_data = places
    contents.state_dict_metadata["float"].size = torch.Size((8, 5))
    with pytest.raises(ConversionError, match=r"do not make up \[8, 5\]"):
        stored_tensors(tmp_path, contents, lambda _: True)
    contents.storage_data.clear()
    assert stored_tensors(tmp_path, contents, lambda key: key != "float") == {}

"""safetensors files, against the library."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints_conversion.formats.huggingface import write_safetensors_file
from lckv.errors import ModelError
from lckv.weights import tensors
from lckv.weights.safetensors_file import open_safetensors
from lckv.weights.tensors import MemorySource, TensorInfo

SOURCE = MemorySource(
    {
        "b": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "a": torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(2)),
        "empty": torch.zeros(0, 4),
        "c": torch.arange(9).half(),
    }
)


def test_the_library_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk_bytes in (1, 33, 10**6):
        monkeypatch.setattr(tensors.row_chunks, "__defaults__", (chunk_bytes,))
        path = tmp_path / "w.safetensors"
        write_safetensors_file(path, SOURCE, list(SOURCE.tensors))
        found = load_file(path)
        assert set(found) == set(SOURCE.tensors)
        for name, tensor in SOURCE.tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 refuses files without
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert all(entry["data_offsets"][0] % 4 == 0 for name, entry in header.items() if name in ("a", "empty"))


@given(data=st.data())
def test_what_the_library_writes_is_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("library") / "w.safetensors"
    extra = {"i": torch.arange(3), "f8": torch.zeros(3).to(torch.float8_e4m3fn), "flag": torch.tensor([True])}
    save_file(SOURCE.tensors | extra, path)
    found = open_safetensors(path)
    assert {name: stored.info for name, stored in found.items()} == MemorySource(
        SOURCE.tensors | extra
    ).infos()
    name = data.draw(st.sampled_from(list(SOURCE.tensors)))
    tensor = SOURCE.tensors[name]
    assert torch.equal(found[name].read(), tensor)
    start = data.draw(st.integers(0, len(tensor)))
    rows = slice(start, data.draw(st.integers(start, len(tensor))))
    assert torch.equal(found[name].read(rows), tensor[rows])


@pytest.mark.parametrize("length", [0, 4, 30, -1])
def test_truncated_files(length: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors_file(path, SOURCE, list(SOURCE.tensors))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        ModelError, match=r"w.safetensors is truncated or no safetensors file \(.*Fetch it again"
    ):
        open_safetensors(path)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors_file(path, SOURCE, list(SOURCE.tensors))
    stored = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"w.safetensors is truncated: it ends at byte \d+"):
        stored["c"].read()


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match=r"w.safetensors is a pickle, whatever its name says"):
        open_safetensors(path)
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"w.safetensors is a pickle, whatever its name says"):
        open_safetensors(path)
    path.write_text("404: not found" * 99)
    with pytest.raises(ModelError, match="is truncated or no safetensors file"):
        open_safetensors(path)
    with pytest.raises(ModelError, match=r"gone.safetensors cannot be read: No such file"):
        open_safetensors(tmp_path / "gone.safetensors")


def test_numbers_that_are_no_weights(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"xy")
    with pytest.raises(ModelError, match="w has the dtype U16, which is not one of weights"):
        open_safetensors(path)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", 0x280) + header.ljust(0x280) + b"x")
    assert open_safetensors(path)["w"].info == TensorInfo((1,), torch.uint8)

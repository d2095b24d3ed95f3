"""Files by torch.save are read as data, and no tensor is larger than what the file holds of it."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.errors import ModelError
from lckv.weights.pickled_file import READING_ERRORS, load_tensors, open_pickle, read_torch_file
from lckv.weights.pickled_tensor import PickledTensor

TENSORS: dict[str, Tensor] = {
    "plain": torch.arange(35.0).view(7, 5),
    "columns first": torch.arange(35.0).view(5, 7).t(),
    "part": torch.arange(90, dtype=torch.bfloat16).view(9, 10)[2:5, 3:],
    "parameter": torch.nn.Parameter(torch.arange(6.0).view(3, 2)),
    "float8": torch.arange(6.0).view(3, 2).to(torch.float8_e4m3fn),
    "truth": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "one row": torch.arange(10.0).view(2, 5)[1:],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(TENSORS | {"scalar": torch.tensor(3)}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.float(), other.detach().float())


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_and_their_rows(path: Path, name: str) -> None:
    stored, wanted = open_pickle(path)[name], TENSORS[name]
    assert stored.info.shape == tuple(wanted.shape)
    assert same(stored.read(), wanted)
    for rows in (slice(0, 1), slice(1, 2), slice(1, None), slice(-1, None)):
        assert same(stored.read(rows), wanted[rows])
    target = torch.zeros(wanted.shape[0], 2 * wanted[0:1].numel() or 2)[:, ::2].view(wanted.shape)
    stored.copy_rows(0, wanted.shape[0], target)
    assert torch.equal(target, wanted.detach().float())


def test_numbers_without_axes(path: Path) -> None:
    assert open_pickle(path)["scalar"].read() == 3


def test_data_and_tensors_together(tmp_path: Path) -> None:
    content = {
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        "step": torch.tensor(3.0),
        "dtype": torch.bfloat16,
    }
    torch.save(content, tmp_path / "x.pt")
    assert load_tensors(read_torch_file(tmp_path / "x.pt")) == content


def test_a_part_of_a_file(tmp_path: Path) -> None:
    record = io.BytesIO()
    torch.save(TENSORS["plain"], record)
    path = tmp_path / "parts"
    path.write_bytes(b"x" * 100 + record.getvalue() + b"y" * 50)
    stored = read_torch_file(path, offset=100, length=len(record.getvalue()))
    assert torch.equal(stored.read(), TENSORS["plain"])
    for offset, length in ((100, len(record.getvalue()) + 51), (-1, 10), (10**9, 10), (0, -5)):
        with pytest.raises(EOFError):
            read_torch_file(path, offset=offset, length=length)


def rebuilt(change: Callable[[str, bytes], bytes], path: Path, **options: Any) -> None:
    """Write the archive anew with other contents."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in contents.items():
            archive.writestr(name, change(name.rpartition("/")[2], content))


def test_a_compressed_archive_is_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(10**6)}, path)
    rebuilt(lambda name, content: content, path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    assert torch.load(path, weights_only=True)["w"].numel() == 10**6, "torch unpacks it"
    with pytest.raises(ModelError, match=r"is compressed, which torch\.save never does"):
        open_pickle(path)


class Calls:
    """Pickled as a call with these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Shaped:
    """A tensor of one number that says it has others."""

    def __init__(self, shape: Any, strides: Any, first: Any = 0) -> None:
        self.made = (first, shape, strides, False, {})

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (torch.zeros(1).untyped_storage(), *self.made)


HUGE = {
    "an array": Calls(bytearray, 10**11),
    "a tensor by its class": Calls(torch.FloatTensor, 10**6, 10**6),
    "a storage by its class": Calls(torch.storage.UntypedStorage, 10**12),
    "a tensor without numbers": Calls(
        torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (9,), (1,), False
    ),
    "a device": Calls(torch.device, "meta"),
    "a set": {1, 2},
}


@pytest.mark.parametrize("name", HUGE)
def test_calls_that_torch_would_do_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"w": HUGE[name]}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"holds more than tensors.* \(it (names|calls) "):
        open_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("shape", "strides", "first"),
    [
        ((10**12,), (0,), 0),
        ((10**12,), (1,), 0),
        ((2,), (1,), 0),
        ((1,), (1,), 1),
        ((1,), (1,), 10**18),
        ((-1,), (1,), 0),
        ((1,), (-1,), 0),
        ((1,), (1,), -1),
        ((2**61, 2**61), (1, 1), 0),
        ((1, 1), (1,), 0),
        ((1.5,), (1,), 0),
        ("ab", (1,), 0),
        ((True,), (1,), 0),
    ],
)
def test_shapes_that_the_file_does_not_hold(tmp_path: Path, shape: Any, strides: Any, first: Any) -> None:
    reader_sees = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, torch.storage.UntypedStorage):
                return ("storage", torch.FloatStorage, "0", "cpu", 1)
            return None

    Pickler(reader_sees, 2).dump({"w": Shaped(shape, strides, first)})
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.pt")
    rebuilt(
        lambda name, content: reader_sees.getvalue() if name == "data.pkl" else content, tmp_path / "x.pt"
    )
    with pytest.raises(ModelError, match=r"x\.pt is truncated, holds more than tensors"):
        open_pickle(tmp_path / "x.pt")


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """As in an archive of a few kilobytes that unpacks to terabytes: all entries are one and the same."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        whole = archive.getinfo("x/data/0")
        for number in range(1, 100):
            copy = zipfile.ZipInfo(f"x/data/{number}")
            copy.header_offset, copy.CRC = whole.header_offset, whole.CRC
            copy.file_size = copy.compress_size = whole.file_size
            archive.filelist.append(copy)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="its entries are larger than the file"):
        open_pickle(path)


def test_every_flipped_byte_is_an_error_or_leaves_a_tensor_of_that_size(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(3.0), "n": 1}, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            content = load_tensors(read_torch_file(path))
        except READING_ERRORS:
            continue
        assert isinstance(content, dict)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x\.pt is a FIFO; it must be a file"):
        open_pickle(tmp_path / "x.pt")


def test_a_file_that_becomes_shorter(path: Path) -> None:
    stored = open_pickle(path)["plain"]
    os.truncate(path, 100)
    with pytest.raises(ModelError, match=r"x\.pt has changed while it was read: it ends 140 bytes too early"):
        stored.read()
    path.unlink()
    with pytest.raises(ModelError, match="has changed while it was read"):
        stored.read()


def test_tensors_that_are_repeated_are_not_loaded_many_times(tmp_path: Path) -> None:
    one = torch.zeros(1000)
    torch.save([one.view(shape) for shape in [(1000,)] * 50], tmp_path / "x.pt")
    content = read_torch_file(tmp_path / "x.pt")
    assert all(isinstance(tensor, PickledTensor) for tensor in content)
    with pytest.raises(EOFError, match="its tensors are larger than the file"):
        load_tensors(content)


def test_what_was_one_object_stays_one(tmp_path: Path) -> None:
    """Else a checkpoint that is loaded and saved again would have other bytes."""
    betas, tensor = (0.9, 0.95), torch.zeros(3)
    content = {"groups": [{"betas": betas}, {"betas": betas}], "one": tensor, "other": tensor}
    torch.save(content, tmp_path / "x.pt")
    loaded = load_tensors(read_torch_file(tmp_path / "x.pt"))
    assert loaded["groups"][0]["betas"] is loaded["groups"][1]["betas"]
    torch.save(loaded, tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as first, zipfile.ZipFile(tmp_path / "y.pt") as second:
        assert first.read("x/data.pkl") == second.read("y/data.pkl")

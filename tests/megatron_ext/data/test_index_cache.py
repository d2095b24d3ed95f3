from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.index_cache import StoredArray, cached_directory, save_array
from megatron_ext.errors import ConfigError


def build(folder: Path) -> Path:
    def fill(directory: Path) -> None:
        save_array(directory / "a.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
        save_array(directory / "b.npy", np.arange(4, dtype=np.int64))

    return cached_directory(folder, "name", {"on": 1}, fill)


def test_pieces_of_an_array(tmp_path: Path) -> None:
    array = StoredArray(build(tmp_path) / "a.npy")
    assert array.shape == (2, 3)
    assert array.read(2, 3).tolist() == [2, 3, 4]
    with pytest.raises(
        ConfigError, match=r"a\.npy: ends after .* Delete .* to have the sample indices built"
    ):
        array.read(5, 2)


@pytest.mark.parametrize("name", ["a.npy", "b.npy", "index.json"])
def test_every_damage_is_noticed_before_a_directory_is_used_again(tmp_path: Path, name: str) -> None:
    path = build(tmp_path) / name
    content = path.read_bytes()
    for damaged in (content[:-1], content[:20], b"", content[:-2] + b"\x07" + content[-1:], b"[" * 9000):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"(a|b|index)\.(npy|json): .* Delete .*name-\w+ to have"):
            build(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"Delete .* to have the sample indices built again"):
        build(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (2, 4)}",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (9999999999999, 9999999999999)}",
        b"{'descr': '<i4', 'fortran_order': False, 'shape': (-2, -3)}",
        b"{'descr': '<i4', 'fortran_order': True, 'shape': (2, 3)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
        b"[" * 90,
        b"",
    ],
)
def test_headers_that_cannot_be(tmp_path: Path, header: bytes) -> None:
    start = b"\x93NUMPY\x02\x00"
    path = tmp_path / "a.npy"
    path.write_bytes(start + len(header).to_bytes(4, "little") + header + bytes(24))
    with pytest.raises(ConfigError, match=r"a\.npy: (cannot be read|\d+ bytes, but its header calls for)"):
        StoredArray(path).read(0, 1)

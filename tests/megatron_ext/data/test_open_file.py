import os
import pickle
from pathlib import Path

import pytest

from megatron_ext.data.open_file import OpenFile
from megatron_ext.errors import ConfigError


def test_pieces_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    file = OpenFile(tmp_path / "f", "Copy it again.")
    assert file.read(10, 3) == bytes([10, 11, 12])
    assert file.read(100, 0) == b""
    assert pickle.loads(pickle.dumps(file)).read(99, 1) == b"c"
    os.truncate(tmp_path / "f", 40)
    assert file.read(38, 2) == bytes([38, 39])
    assert file.size == 40
    with pytest.raises(
        ConfigError,
        match=r"f: ends after 40 bytes, but bytes 39 to 41 are asked for: it was cut short since it was "
        r"checked\. Copy it again\.$",
    ):
        file.read(39, 2)


def test_a_file_that_cannot_be_opened_or_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: cannot be opened \(No such file or directory\)\. Copy it"):
        OpenFile(tmp_path / "none", "Copy it again.")
    folder = OpenFile(tmp_path, "Copy it again.")
    with pytest.raises(ConfigError, match=r"cannot be read at byte 0 \(Is a directory\)\. Copy it again\."):
        folder.read(0, 1)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        OpenFile(tmp_path / "f", "").read(0, 1)
    assert len(os.listdir("/proc/self/fd")) == before

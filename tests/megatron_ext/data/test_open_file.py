import os
import pickle
from pathlib import Path

import pytest

from megatron_ext.data.open_file import OpenFile, OpenFiles, open_limit
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.descriptors import at_most, descriptors


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


def test_of_many_files_only_some_are_open(tmp_path: Path) -> None:
    before, shared = len(descriptors()), OpenFiles(3)
    for number in range(9):
        (tmp_path / str(number)).write_bytes(bytes([number] * 4))
    files = [OpenFile(tmp_path / str(number), "", shared) for number in range(9)]
    assert len(descriptors()) == before, "a file is opened when it is read"
    for number in [*range(9), 0, 8, 7, 0, 1]:
        assert files[number].read(1, 2) == bytes([number] * 2)
        assert len(shared) <= 3 and len(descriptors()) == before + len(shared)
    copies = pickle.loads(pickle.dumps(files))
    assert copies[0]._files is copies[8]._files and len(copies[0]._files) == 0
    assert copies[5].read(0, 1) == bytes([5])
    del files, copies, shared
    assert len(descriptors()) == before


def test_a_file_that_was_replaced_is_not_opened_again(tmp_path: Path) -> None:
    shared = OpenFiles(1)
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 4)
    replaced, copied, other = (OpenFile(tmp_path / name, "Copy it again.", shared) for name in "abc")
    assert (replaced.read(0, 1), copied.read(0, 1), other.read(0, 1)) == (b"a", b"b", b"c")
    times = (tmp_path / "b").stat()
    for name in "ab":
        (tmp_path / "new").write_bytes(b"zzzz")
        os.replace(tmp_path / "new", tmp_path / name)
    os.utime(tmp_path / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        ConfigError, match=r"a: 4 bytes, but 4 when .* was replaced or changed since\. Copy it"
    ):
        replaced.read(0, 1)
    assert copied.read(0, 1) == b"z", "one that says to be as old is taken for a copy"


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    file = OpenFile(tmp_path / "f", "Delete it.")
    with at_most(0):
        spare = [os.dup(0) for _ in range(open_limit() - len(descriptors()) + 1)]
        try:
            with pytest.raises(ConfigError) as raised:
                file.read(0, 1)
        finally:
            for descriptor in spare:
                os.close(descriptor)
    assert "too many files are open, of " in str(raised.value) and "ulimit -n 4096" in str(raised.value)
    assert "Delete" not in str(raised.value)


def test_the_limit_is_a_share_of_the_process_s() -> None:
    with at_most(40):
        assert OpenFiles().limit == open_limit() // 4
    assert OpenFiles(7).limit == 7

"""Only files are opened, and nothing is waited for."""

import os
import socket
from pathlib import Path

import pytest

from lckv.plain_files import NotPlainError, is_plain_name, odd_entries, open_plain, plain_size, read_plain


def test_files_and_links_to_files(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0").write_bytes(b"content")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to("../blobs/0")
    assert read_plain(link) == b"content"
    assert plain_size(link) == 7
    with open_plain(link, buffering=0) as file:
        assert file.read(3) == b"con"
    assert odd_entries(link.parent) == []


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a socket", "a device"])
def test_what_only_looks_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    path = Path("x")
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("x")
    else:
        path.symlink_to("/dev/zero")
    for action in (open_plain, read_plain, plain_size):
        with pytest.raises(NotPlainError, match=f"x is {kind}; it must be a file"):
            action(path)
    assert odd_entries(Path()) == ([] if kind == "a folder" else [f"x is {kind}; it must be a file"])


def test_a_missing_file_and_a_broken_link(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "x")
    (tmp_path / "y").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "y")
    assert odd_entries(tmp_path) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", "a\0b", 3, None])
def test_names_that_lead_out_of_a_folder(name: object) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")

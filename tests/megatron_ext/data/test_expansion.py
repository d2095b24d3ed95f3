"""Which files an input stands for; each only once."""

import os
from pathlib import Path

import pytest

from megatron_ext.data.expansion import expand
from megatron_ext.data.sources import find_sources
from megatron_ext.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.txt", "d/sub/b.txt", "d/.hidden/c.txt", "d/.e.txt", "elsewhere/f.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    return tmp_path


def names(entry: str) -> list[str]:
    return [str(path) for path in expand(entry)]


def test_a_folder_is_its_glob(folder: Path) -> None:
    Path("d/link").symlink_to(folder / "elsewhere")
    expected = ["d/a.txt", "d/link/f.txt", "d/sub/b.txt"]
    assert names("d") == names("./d/") == names("d/*") == names("d/**") == expected


@pytest.mark.parametrize(
    "again", ["k.txt", "./k.txt", "../here/k.txt", "link.txt", "hard.txt", "*.txt", ".", "linked"]
)
def test_a_file_given_twice_is_refused(tmp_path: Path, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("k.txt").write_text("words")
    if again == "link.txt":
        Path(again).symlink_to("k.txt")
    elif again == "hard.txt":
        os.link("k.txt", again)
    elif again == "linked":
        (tmp_path / again).symlink_to("here")
        again = "../linked"
    for inputs in (["k.txt", again], [again, str(here / "k.txt")]):
        with pytest.raises(
            ConfigError, match=r"input '.*' is given twice \(the same file as '.*'\): its documents"
        ):
            find_sources(inputs)
    assert len(find_sources(["k.txt"])) == 1


def test_links_inside_a_folder(folder: Path) -> None:
    Path("d/again.txt").symlink_to("a.txt")
    with pytest.raises(ConfigError, match="is given twice"):
        find_sources(["d"])
    Path("d/again.txt").unlink()
    Path("d/loop").symlink_to(folder / "d")
    with pytest.raises(ConfigError, match="input 'd/loop' is a link to 'd', whose files are taken already"):
        find_sources(["d"])


def test_what_cannot_be_read(folder: Path) -> None:
    Path("d/gone.txt").symlink_to("nowhere")
    for entry in ("d", "d/gone.txt", "d/*.txt"):
        with pytest.raises(ConfigError, match=r"input 'd/gone.txt' is a link that leads to no file"):
            expand(entry)
    Path("d/gone.txt").unlink()
    os.mkfifo("d/pipe")
    for entry in ("d", "d/pipe", "d/*"):
        with pytest.raises(
            ConfigError, match="input 'd/pipe' is a pipe or a device, which cannot be read twice"
        ):
            expand(entry)
    assert [path.name for path in expand("d", [".txt"])] == ["a.txt", "b.txt"]

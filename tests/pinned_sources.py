"""Python sources of packages that run only with CUDA, at pinned versions: read or imported without being
installed.

pip brings them once, and refuses a file with another hash. Where it cannot bring them, tests that need them
are skipped with what pip said.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

CACHE = Path(__file__).resolve().parent.parent / "build" / "pinned_sources"
_SECONDS = 240
_WRONG_FILE = "DO NOT MATCH THE HASHES"
_VARIABLES = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
"""Or flash-attn's setup.py looks for a CUDA compiler before it says its name."""


@dataclass(frozen=True)
class Pin:
    """One file of a package index."""

    name: str
    version: str
    sha256: str
    built: bool
    """A wheel; else a source distribution, whose setup.py pip asks for the package's name."""


TRANSFORMER_ENGINE = Pin(
    "transformer-engine", "2.11.0", "7ee1eae8fa6b0cb471c6066aa3555304fda8537174e5019929dc0c8655071df3", True
)
FLASH_ATTN = Pin(
    "flash-attn", "2.8.3", "1e71dd64a9e0280e0447b8a0c2541bad4bf6ac65bdeaa2f90e51a9e57de0370d", False
)
FLASH_ATTN_OLDEST = Pin(
    "flash-attn", "2.7.0.post2", "62244de20dabad9a42d0636f6b2ea4c051d33df179a0b3bea4352502ebca1466", False
)
LIGER_KERNEL = Pin(
    "liger-kernel", "0.8.5", "60789cd576af073ab9b192b570d2597fd0cdad489cd62fb44fb16256d43754c9", True
)
CUT_CROSS_ENTROPY = Pin(
    "cut-cross-entropy", "25.1.1", "e46f26d348f6a67927d17e65c5a212e795be13dcad5b10a77a200d6b8102d9d1", True
)


def folder_of(pin: Pin) -> Path:
    """The folder that holds the package's folder. Skips the test where pip cannot bring it."""
    obstacle = _bring(pin)
    if obstacle is not None:
        pytest.skip(f"pip cannot bring {pin.name} {pin.version}: {obstacle}")
    return CACHE / f"{pin.name}-{pin.version}"


@cache
def _bring(pin: Pin) -> str | None:
    """What pip said where it cannot; None: it is there."""
    place = CACHE / f"{pin.name}-{pin.version}"
    if place.is_dir():
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as name:
        temporary = Path(name)
        asked = temporary / "requirements.txt"
        asked.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
        obstacle = _download(pin, asked, temporary / "downloaded")
        if obstacle is not None:
            return obstacle
        (archive,) = (temporary / "downloaded").iterdir()
        _unpack(archive, temporary / "unpacked")
        if not place.is_dir():
            (temporary / "unpacked").rename(place)
    return None


def _download(pin: Pin, requirements: Path, folder: Path) -> str | None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "download"]
    command += ["--quiet", "--no-deps", "--no-build-isolation", "--require-hashes", "--dest", str(folder)]
    command += ["--only-binary" if pin.built else "--no-binary", pin.name, "--requirement", str(requirements)]
    try:
        done = subprocess.run(
            command, env=os.environ | _VARIABLES, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"nothing came within {_SECONDS} s"
    assert _WRONG_FILE not in done.stderr, done.stderr
    return None if done.returncode == 0 else _complaint(done.stderr.splitlines())


def _complaint(lines: Sequence[str]) -> str:
    """What pip calls the error; else its last words."""
    errors = [line for line in lines if line.lower().startswith("error")]
    return next((line for line in (*errors, *reversed(lines)) if line.strip()), "it failed without a word")


def _unpack(archive: Path, folder: Path) -> None:
    """The Python files and what a wheel says of itself."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return
    with tarfile.open(archive) as sources:
        members = [member for member in sources if member.isfile() and member.name.endswith(".py")]
        for member in members:
            member.name = member.name.partition("/")[2]
        sources.extractall(folder, members, filter="data")

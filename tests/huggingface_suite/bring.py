"""`python -m tests.huggingface_suite.bring`: pip brings transformers' tests, of the installed version.

Exits with 0 where they are there, and with 75 and the reason where pip cannot bring them.
"""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

CACHE = Path(__file__).resolve().parents[2] / "build" / "huggingface_suite"
CANNOT = 75
"""Exit status: try again later."""


def folder() -> Path:
    """Where the tests of the installed version lie, if they were brought."""
    return CACHE / f"transformers-{version('transformers')}" / "tests"


def packages() -> Path:
    """Where packages lie that only these tests need."""
    return CACHE / "packages"


def bring() -> str | None:
    """Bring what is not there yet. Returns what pip said where that is impossible; None: all is there."""
    release = version("transformers")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not packages().is_dir():
        asked = [*pip, "install", "--no-deps", "--target", str(packages()), "parameterized==0.9.0"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip()
    if not folder().is_dir():
        with TemporaryDirectory() as place:
            # Without isolation nothing is installed to build what only is unpacked.
            asked = [
                *pip,
                "download",
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                ":all:",
                "-d",
                place,
            ]
            done = subprocess.run([*asked, f"transformers=={release}"], capture_output=True, text=True)
            if done.returncode:
                return done.stderr.strip()
            (archive,) = Path(place).glob("*.tar.gz")
            with tarfile.open(archive) as files:
                members = [one for one in files if one.name.startswith(f"transformers-{release}/tests/")]
                files.extractall(CACHE, members, filter="data")
    return None


if __name__ == "__main__":
    obstacle = bring()
    if obstacle is not None:
        print(f"transformers' tests cannot be brought: {obstacle}", file=sys.stderr)
        sys.exit(CANNOT)
    print(folder())

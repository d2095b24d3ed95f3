"""What an input file holds, seen from its first bytes after decompression.

The name alone decides nothing. Where name and content disagree, or the content could be two things, the file
is refused with the option that decides.
"""

import json
import re
from pathlib import Path
from typing import Literal

from megatron_ext.data.decompression import MAGIC_BYTES, Compression, compression_of, decompressed
from megatron_ext.errors import ConfigError

Format = Literal["jsonl", "text", "parquet"]
TextFormat = Literal["auto", "jsonl", "text"]

BOM = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8."""

_PROBE_BYTES = 1 << 16
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_NEVER_TEXT = {
    rb"\x1f\x8b|\x28\xb5\x2f\xfd": "is compressed twice; decompress it once",
    rb"BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x04\x22\x4d\x18": "is compressed by bzip2, xz or lz4; use gzip or zstd",
    rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|.{257}ustar": "is an archive; unpack it and give the folder",
    rb"ARROW1\x00\x00": "is an Arrow file; write it as Parquet or JSON lines",
}
"""Patterns of first bytes, and what to do about such a file."""


def format_of(path: Path, text_format: TextFormat) -> tuple[Format, Compression]:
    """Format and compression of a file; with "auto" the format is read off the content.

    Parquet is known by its first bytes. A file is JSON lines if its first lines are JSON objects and its
    name ends with .jsonl, .ndjson or .json, or says nothing (`wiki_00`, `part.00`); names of compressed files
    are taken without .gz and .zst. All other text is a text. Raises ConfigError for what is neither, or could
    be both.
    """
    with path.open("rb") as disk:
        compression = compression_of(str(path), disk.read(MAGIC_BYTES))
        disk.seek(0)
        start = decompressed(str(path), disk, compression).read(_PROBE_BYTES)
    for pattern, what in _NEVER_TEXT.items():
        if re.match(pattern, start, re.DOTALL):
            raise ConfigError(f"input '{path}' {what}.")
    if start.startswith(b"PAR1"):
        _check_parquet(path, text_format, compression)
        return "parquet", compression
    return (_auto(path, start) if text_format == "auto" else text_format), compression


def _check_parquet(path: Path, text_format: TextFormat, compression: Compression) -> None:
    if compression:
        raise ConfigError(f"input '{path}' is a Parquet file, compressed once more; decompress it.")
    if text_format != "auto":
        raise ConfigError(
            f"input '{path}' is a Parquet file, but --text-format is {text_format}; leave that option out."
        )


def _auto(path: Path, start: bytes) -> Format:
    suffix = _suffix(path)
    if suffix == ".parquet":
        raise ConfigError(
            f"input '{path}' is no Parquet file, as its name says; make or copy it again, or give it its "
            "right name."
        )
    if b"\0" in start or start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(
            f"input '{path}' is no UTF-8 text but binary data, or text in UTF-16; convert it, or leave it "
            "out with --suffix."
        )
    if suffix in _JSON_LINES_SUFFIXES:
        return "jsonl"
    content = _content(start)
    if content == "text" and suffix != ".json":
        return "text"
    if content == "json lines" and suffix in ("", ".json"):
        return "jsonl"
    if content == "blank":
        return "jsonl" if suffix == ".json" else "text"
    if content == "json lines":
        raise ConfigError(
            f"input '{path}' looks like JSON lines but has another name; say --text-format jsonl or text."
        )
    raise ConfigError(
        f"input '{path}' looks like JSON, but not like JSON lines, which have an object on each line. "
        "Convert it (jq -c '.[]' does so with an array), or say --text-format jsonl or text."
    )


def _suffix(path: Path) -> str:
    """The end of the name that says something of the content: not .gz, .zst, nor a number."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    while re.fullmatch(r"\.\d+", Path(name).suffix):
        name = Path(name).stem
    return Path(name).suffix.lower()


def _content(start: bytes) -> Literal["json lines", "json", "text", "blank"]:
    """`start`: the first `_PROBE_BYTES` bytes, or the whole file."""
    start = start.strip(b" \t\r\n\f\v").removeprefix(BOM).lstrip()
    if not start:
        return "blank"
    if re.match(rb"\[\s*\{\s*\"", start):
        return "json"
    if not re.match(rb"\{\s*[\"}]", start):
        return "text"
    lines = [line for line in start.split(b"\n") if line.strip()]
    if len(lines) == 1 and len(start) > _PROBE_BYTES // 2:
        return "json lines"  # a first line so long that its end is not in sight
    following = lines[1].lstrip().removeprefix(BOM).startswith(b"{") if len(lines) > 1 else True
    return "json lines" if _is_object(lines[0]) and following else "json"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except RecursionError:
        return True  # too deep to be read, but an object by its beginning
    except ValueError:
        return False

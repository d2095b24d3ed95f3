"""Writes a corpus of real text that every machine has.

    lckv-megatron demo-corpus --output corpus.jsonl
    lckv-megatron demo-corpus --output small.jsonl --max-bytes 2000000

The text is the sources and the documentation of Python's standard library. The output is JSON lines, a
document each, with "text" and "source". Its size goes into a .json file of the same name. Documents are in a
random order that is the same on every machine, so that any part of the corpus is like the rest. Nothing is
downloaded. Tests and binary files are left out.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import platform
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_ext.arguments import ProgramParser
from megatron_ext.atomic import write_file
from megatron_ext.data.outputs import check_replaceable
from megatron_ext.errors import ConfigError

_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "pydoc_data",
}
_TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")


@dataclass(frozen=True)
class CorpusSize:
    """How large a corpus is, and of which Python."""

    documents: int
    text_bytes: int
    python: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status: 0, or 2 after a message about what to change."""
    arguments = _parser().parse_args(argv)
    try:
        size = write_corpus(Path(arguments.output), arguments.max_bytes)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.output}: {size.documents:,} documents, {size.text_bytes / 1e6:.1f} MB of text, Python "
        f"{size.python}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("demo-corpus", __doc__)
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="the file to write")
    parser.add_argument(
        "--max-bytes", type=int, help="leave out documents beyond so many bytes of text (default: none)"
    )
    return parser


def write_corpus(output: Path, max_bytes: int | None = None) -> CorpusSize:
    """Write the corpus and the file about its size.

    Raises ConfigError if there is no text, or none that small, or another program's file is in the way.
    """
    if output.suffix != ".jsonl":
        raise ConfigError(
            f"--output={output} must end with .jsonl; its size goes into a .json file of that name."
        )
    size_file = output.with_suffix(".json")
    check_replaceable(output, [], _is_corpus)
    check_replaceable(size_file, [], _is_size)
    lines: list[bytes] = []
    text_bytes = 0
    for source, text in sorted(
        _documents(), key=lambda document: hashlib.sha256(document[0].encode()).digest()
    ):
        size = len(text.encode())
        if max_bytes is None or text_bytes + size <= max_bytes:
            lines.append(json.dumps({"text": text, "source": source}, ensure_ascii=False).encode() + b"\n")
            text_bytes += size
    if not lines:
        raise ConfigError(
            f"no document of Python's standard library was found that fits into --max-bytes={max_bytes}."
        )
    corpus_size = CorpusSize(len(lines), text_bytes, platform.python_version())
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, b"".join(lines))
    write_file(size_file, json.dumps(asdict(corpus_size), indent=1).encode() + b"\n")
    return corpus_size


def _is_corpus(path: Path) -> bool:
    with path.open("rb") as file:
        return _has_keys(file.readline(1 << 26), {"text", "source"})


def _is_size(path: Path) -> bool:
    return _has_keys(path.read_bytes(), {field.name for field in fields(CorpusSize)})


def _has_keys(content: bytes, keys: set[str]) -> bool:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == keys


def _documents() -> Iterator[tuple[str, str]]:
    """Name and text of all documents: files of the library, the language reference,
    and what built-in functions say."""
    yield from _files(Path(sysconfig.get_path("stdlib")))
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from ((f"pydoc/{topic}", text) for topic, text in topics.items())
    for name in sys.builtin_module_names:
        if not name.startswith("_"):
            yield f"builtin/{name}", _documentation(name)


def _files(library: Path) -> Iterator[tuple[str, str]]:
    for directory, subdirectories, names in os.walk(library):
        subdirectories[:] = [name for name in subdirectories if name not in _LEFT_OUT]
        for name in names:
            path = Path(directory, name)
            text = _text(path) if name.endswith(_TEXT_SUFFIXES) or name.startswith("README") else ""
            if text.strip():
                yield path.relative_to(library).as_posix(), text


def _text(path: Path) -> str:
    """Contents of a source or text file; empty if it is not in the encoding that it says."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _documentation(module_name: str) -> str:
    module = importlib.import_module(module_name)
    parts = [f"{module_name}: {inspect.getdoc(module) or ''}"]
    for name, member in sorted(vars(module).items()):
        if callable(member) and not name.startswith("_") and (text := inspect.getdoc(member)):
            parts.append(f"{module_name}.{name}\n{text}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""What the options of programs share: how they are spelt, and the texts of their values."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class ProgramParser(argparse.ArgumentParser):
    """The options of one program. They are spelt with dashes; the underscores of earlier versions
    (`--new_tokens`) are understood too."""

    def __init__(self, name: str, text: str | None, **settings: Any) -> None:
        """`name`: behind lckv-megatron. `text`: the module's docstring. `settings`: of ArgumentParser."""
        super().__init__(
            prog=f"lckv-megatron {name}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def parse_known_args(  # type: ignore[override]  # typeshed has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, after spelling options with dashes. `parse_args` calls it too."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(self._dashed(words)), namespace)

    def _dashed(self, words: Sequence[str]) -> Iterator[str]:
        for word in words:
            option, equals, value = word.partition("=")
            dashed = option.replace("_", "-")
            known = option not in self._option_string_actions and dashed in self._option_string_actions
            yield f"{dashed}{equals}{value}" if known else word


def memory_size(text: str) -> int:
    """Bytes that a text such as 16GiB, 1.5GB or 4096 says."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size in memory such as 16GiB, 1.5GB or a number of bytes"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)

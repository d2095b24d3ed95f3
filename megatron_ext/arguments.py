"""What the options of programs share: how they are spelt, and the texts of their values."""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_UNITS = {f"{letter}{unit}": 1000**power for letter, power in _POWERS.items() for unit in ("", "B")}
_UNITS |= {f"{letter}IB": 1024**power for letter, power in _POWERS.items() if power}


class DashedParser(argparse.ArgumentParser):
    """Spells options with dashes, and understands the underscores of earlier versions (`--new_tokens`)."""

    def parse_known_args(  # type: ignore[override]  # typeshed has overloads for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, after spelling options with dashes. `parse_args` calls it too."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._dashed(word) for word in words], namespace)

    def _dashed(self, word: str) -> str:
        option, equals, value = word.partition("=")
        dashed = option.replace("_", "-")
        known = option not in self._option_string_actions and dashed in self._option_string_actions
        return f"{dashed}{equals}{value}" if known else word


class ProgramParser(DashedParser):
    """The options of `lckv-megatron NAME`."""

    def __init__(self, name: str, text: str | None, **settings: Any) -> None:
        """`text`: the program's docstring. `settings`: of ArgumentParser."""
        super().__init__(
            prog=f"lckv-megatron {name}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )


def memory_size(text: str) -> int:
    """Bytes that a text such as 16GiB, 1.5GB, 500M (of 10^6) or 4096 says."""
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


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value

"""The commands of a page: its ```bash blocks, which the tests run, and what else its fences hold."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("lckv-megatron", "torchrun", "python", "pip", "hf", "sbatch", "srun", "curl", "make", "export")
"""What a line of commands begins with. Such a line outside a bash block would be one that no test runs."""

_VARIABLES = re.compile(r"^(\w+=\S* )+")
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    """What stands behind the fence: bash, python, yaml; "" for what a program prints."""

    text: str
    line: int
    """Where it begins, from 1."""


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[2].strip(), match[3], text.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(text)
    ]


def commands_outside_bash(block: Block) -> list[str]:
    """Lines of a block that are commands, though the block is none that is run. `$ COMMAND` with what it
    prints is a quotation."""
    if block.language == "bash":
        return []
    lines = [line.strip() for line in block.text.splitlines()]
    return [line for line in lines if _VARIABLES.sub("", line).partition(" ")[0] in PROGRAMS]


def substituted(text: str, replaced: dict[str, str]) -> tuple[str, set[str]]:
    """`text` with the replacements, longest first, each wherever it occurs; and those that did occur."""
    used = set()
    for before in sorted(replaced, key=len, reverse=True):
        if before in text:
            text, used = text.replace(before, replaced[before]), used | {before}
    return text, used


def without(text: str, beginnings: Iterable[str]) -> tuple[str, set[str]]:
    """`text` without the commands that begin so, continued lines included; and those that were there."""
    used = set()
    for beginning in beginnings:
        command = re.compile(rf"^{re.escape(beginning)}(?:.*\\\n)*.*\n", re.M)
        if command.search(text):
            text, used = command.sub("", text), used | {beginning}
    return text, used

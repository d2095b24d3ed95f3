"""Commands of the check, each with what is left of its time."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SHOWN_CHARACTERS = 2000


@dataclass
class Part:
    """What became of one part."""

    name: str
    seconds: float = 0.0
    passed: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class CommandError(RuntimeError):
    """A command failed, or took too long."""


class Commands:
    """Runs programs of the project until a moment at which all must be over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until the check must be over."""
        return self._end - time.monotonic()

    def python(self, *arguments: str | Path, limit: float = 300, **variables: str) -> str:
        """What a Python program says, errors among it. Raises CommandError with the end of that."""
        command = [sys.executable, *map(str, arguments)]
        limit = min(limit, self.seconds_left)
        if limit <= 0:
            raise CommandError("not reached: the time of the check is over")
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            raise CommandError(f"not done after {limit:.0f} s: {said[-_SHOWN_CHARACTERS:]}") from None
        if done.returncode:
            raise CommandError(f"exit status {done.returncode}: {done.stdout[-_SHOWN_CHARACTERS:]}")
        return done.stdout

    def program(self, name: str, *arguments: str | Path, limit: float = 300, **variables: str) -> str:
        """As `python`, of a program of the project: lckv-megatron NAME."""
        return self.python("-m", "lckv_megatron", name, *arguments, limit=limit, **variables)

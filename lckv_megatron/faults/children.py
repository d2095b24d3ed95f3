"""Runs a function in a process of its own, which may take only so much time and memory.

The process is forked: everything is imported already. What it prints is lost.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lckv.errors import ModelError
from megatron_ext.errors import ConfigError

REFUSALS = (ConfigError, ModelError, FileNotFoundError)
"""What programs show without a traceback."""
_MORE_BYTES = 3 * 2**30
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    how: Literal["value", "refused", "traceback", "hangs", "killed"]
    text: str
    """The function's result, the message of its error, or the traceback."""


def in_child(action: Callable[[], str], *, seconds: float = 60.0, more_bytes: int = _MORE_BYTES) -> Ending:
    """Call `action` in a child that may take `seconds`, and `more_bytes` of memory beyond what there is."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_child(action, writing, more_bytes)
    os.close(writing)
    try:
        said = _read(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
    if said is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Ending("hangs", f"not done after {seconds:g} s")
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if not said:
        return Ending("killed", f"ended with {code} and said nothing")
    how, text = json.loads(said)
    return Ending(how, text)


def _be_the_child(action: Callable[[], str], writing: int, more_bytes: int) -> None:
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        limit = _address_space() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        message = json.dumps(_outcome(action)).encode()
        while message:
            message = message[os.write(writing, message) :]
    finally:
        os._exit(0)


def _outcome(action: Callable[[], str]) -> tuple[str, str]:
    try:
        return "value", action()
    except REFUSALS as error:
        return "refused", str(error)
    except SystemExit as error:
        return ("refused" if error.code == 2 else "traceback"), f"exit status {error.code}"
    except BaseException:  # noqa: BLE001 - a campaign counts whatever it is
        return "traceback", "".join(traceback.format_exception(*sys.exc_info(), limit=-6))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _read(descriptor: int, deadline: float) -> bytes | None:
    """All that is written, None where that does not end in time."""
    said = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(descriptor, _CHUNK)
        if not part:
            return said
        said += part

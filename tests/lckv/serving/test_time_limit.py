"""An end for code that never ends."""

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from lckv.serving.time_limit import TookTooLongError, time_limit


def code(lines: str, **names: Any) -> Callable[[], None]:
    """A function of a file of its own."""
    exec(compile(f"def run():\n    {lines}", "<own>", "exec"), names)
    return names["run"]


def test_a_loop_without_end_is_ended() -> None:
    started, before = time.monotonic(), sys.gettrace()
    forever = code("""while True:
        try:
            sum(range(10))
        except Exception:
            continue""")
    with pytest.raises(TookTooLongError), time_limit(0.1, "<own>"):
        forever()
    assert 0.1 <= time.monotonic() - started < 20
    assert sys.gettrace() is before


def test_what_ends_in_time_is_not_disturbed() -> None:
    with time_limit(20, "<own>"):
        code("sorted([2, 1])")()


class _Garbage:
    """Takes its time when it is collected, where exceptions are swallowed."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass


def test_time_that_is_up_while_garbage_is_collected_is_up_afterwards() -> None:
    def collect() -> None:
        _Garbage()
        gc.collect()

    with pytest.raises(TookTooLongError), time_limit(0.1, "<own>"):
        code(
            """collect()
    while True:
        pass""",
            collect=collect,
        )()

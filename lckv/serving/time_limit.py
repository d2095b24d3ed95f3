"""An end for Python code of others, such as a chat template, that may never come to one by itself."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TEMPLATES = "<template>"
"""What Jinja calls the file of the code that it makes of a template."""


class TookTooLongError(BaseException):
    """Time is up; `except Exception` lets it pass."""


@contextmanager
def time_limit(seconds: float, file: str) -> Iterator[None]:
    """Raises TookTooLongError at the next line of code from `file` that is called inside, once `seconds` have
    passed. In other code, such as what the collector of garbage calls, the exception could be swallowed."""
    deadline = time.monotonic() + seconds

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        if time.monotonic() > deadline:
            raise TookTooLongError
        time.sleep(0)  # other threads wait for the interpreter: a loop would keep it 5 ms each time
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)

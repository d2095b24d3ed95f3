"""How many files this process has open, and may have."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """The process may open so many files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, descriptors())) + 1 + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")

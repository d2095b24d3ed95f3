"""When Python looks for garbage. Left to itself each rank does so at moments of its own, and all others wait
for it in the next collective: with N ranks that is N pauses instead of one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def manual_collection(interval: int) -> Iterator[Callable[[int], None]]:
    """While the context is open, garbage is collected only by what this yields, which is called with the
    number of each iteration that is done, and does so every `interval` iterations. With 0 Python decides.

    What is there at the beginning, model and libraries, is not looked through again.
    """
    if interval == 0:
        yield lambda iteration: None
        return

    def collect(iteration: int) -> None:
        if iteration % interval == 0:
            gc.collect()

    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

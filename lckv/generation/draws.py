"""Random numbers of a request, one for each token that is sampled."""

from collections import deque
from random import Random
from typing import Protocol


class Uniform(Protocol):
    """Gives numbers, at least 0 and below 1."""

    def random(self) -> float:
        """The next one."""
        ...


class Draws:
    """Implements `Uniform`; what comes can be seen before it is drawn."""

    def __init__(self, seed: int | None) -> None:
        """The same `seed` gives the same numbers; None: others each time."""
        # As a text, because integers lose their sign.
        self._source = Random() if seed is None else Random(str(seed))
        self._seen: deque[float] = deque()

    def random(self) -> float:
        """The next one."""
        return self._seen.popleft() if self._seen else self._source.random()

    def ahead(self, count: int) -> list["Drawn"]:
        """The next `count`, which are still to be drawn."""
        while len(self._seen) < count:
            self._seen.append(self._source.random())
        return [Drawn(self._seen[place]) for place in range(count)]


class Drawn:
    """Implements `Uniform`: always the same number."""

    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        """That number."""
        return self._number

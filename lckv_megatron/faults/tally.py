"""What a campaign has counted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from lckv_megatron.tables import table


class Verdict(Enum):
    """How one fault ended."""

    NOTICED = "noticed"
    """An error that names what is wrong, or the older good checkpoint with a message."""

    HARMLESS = "harmless"
    """The same result as without the fault."""

    OTHER = "other value"
    """Another result, of a format that has no checksum: what is there now is as valid as what was there."""

    WRONG = "wrong"
    """A wrong result, a traceback, a process that hangs, dies or takes too much memory, code that was run."""


@dataclass
class Tally:
    """The faults of one kind."""

    kind: str
    counts: dict[Verdict, int] = field(default_factory=lambda: dict.fromkeys(Verdict, 0))
    wrongs: list[str] = field(default_factory=list)
    """What went wrong, each with the fault in front."""

    def add(self, verdict: Verdict, fault: str, said: str) -> None:
        """Count one fault; `said`: the error, or the result."""
        self.counts[verdict] += 1
        if verdict is Verdict.WRONG:
            self.wrongs.append(f"{self.kind}: {fault}: {said}")

    @property
    def tried(self) -> int:
        """All of them."""
        return sum(self.counts.values())


def lines(tallies: Iterable[Tally]) -> Iterator[str]:
    """A table with one row for each kind."""
    head = ("kind", "tried", *(verdict.value for verdict in Verdict))
    rows = [(tally.kind, *map(str, (tally.tried, *tally.counts.values()))) for tally in tallies]
    yield from table([head, *rows])

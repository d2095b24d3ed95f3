"""Requests for memory: how many bytes, from when until when. Times are numbers of events."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """A storage. Two of them are never equal: each is a request of its own."""

    bytes: int
    start: int
    """The first event at which it is there."""
    end: int
    """The first event at which it is gone; later than `start`."""

    def overlaps(self, other: "Request") -> bool:
        """Whether there is a time at which both are there."""
        return self.start < other.end and other.start < self.end


def events(requests: Iterable[Request]) -> Iterator[tuple[bool, Request]]:
    """Begins (True) and ends (False) of requests in the order of time; what ends at an event ends first."""
    timed = [
        (time, begins, number, request)
        for number, request in enumerate(requests)
        for time, begins in ((request.start, True), (request.end, False))
    ]
    timed.sort(key=lambda event: event[:3])
    for _, begins, _, request in timed:
        yield begins, request


def live_peak(requests: Iterable[Request]) -> int:
    """The most bytes at a time: no placement can have a lower peak."""
    live = most = 0
    for begins, request in events(requests):
        live += request.bytes if begins else -request.bytes
        most = max(most, live)
    return most


def merged(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests that are there at the same times, together.

    Times are compared by what they separate: two begins without an end between them are one time, and two
    ends without a begin between them. Which requests overlap is the same before and after.
    """
    times: dict[tuple[Request, bool], int] = {}
    now, before = 0, True
    for begins, request in events(requests):
        now += begins != before
        before = begins
        times[request, begins] = now
    groups: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        groups.setdefault((times[request, True], times[request, False]), []).append(request)
    return list(groups.values())

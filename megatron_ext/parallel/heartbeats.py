"""Which rank keeps the others waiting, and since when.

A collective that times out names nobody. So a thread of every rank writes into the store of the process
groups, every few seconds, at which iteration the rank is, since when, and where its main thread is. It costs
the training nothing: it waits for no device and for no other rank. Rank 0's thread warns when an iteration
takes most of the time that collectives have, and a rank whose collective has failed reads what the others
wrote.
"""

import faulthandler
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.errors import LostRankError

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 2.0
_PATIENCE = 0.8
"""Share of the time-out of collectives after which rank 0 warns."""
_NAMED = 8
_OURS = tuple(f"{Path(__file__).parents[2] / package}{os.sep}" for package in ("megatron_ext", "lckv"))
_WAITING = re.compile(r"/megatron/core/(distributed/|pipeline_parallel/p2p)|/megatron_ext/schedule/mail")
"""Files of Megatron, and ours, that wait for what they have begun."""
_CALL = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
"""As `faulthandler` writes it."""
_COLLECTIVE_FAILURE = re.compile(
    r"gloo|nccl|timed out|connection (closed|reset|refused)|broken pipe|socket|monitoredBarrier",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sign:
    """What a rank writes of itself. Times are seconds since 1970."""

    rank: int
    iteration: int
    since: float
    """When it came to this iteration, or batch of an evaluation."""
    written: float
    place: str
    """File, line and function of its main thread."""
    waits: bool
    """Whether it waits there for other ranks, as far as that can be seen."""


class Heartbeats:
    """Of one rank. Make it with `heartbeats`."""

    def __init__(self, store: Any, timeout_minutes: float) -> None:
        self._store = store
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._patience = _PATIENCE * 60 * timeout_minutes
        self.pause = min(_LONGEST_PAUSE_SECONDS, self._patience / 5)
        """Seconds between two signs."""
        self.has_lost = False
        """Whether this rank's collective has failed: it waited, and the others need not look here."""
        self._main_thread = threading.get_ident()
        self._at = (0, time.time())
        self._ended = threading.Event()

    def at(self, iteration: int) -> None:
        """The main thread goes on: it has come to `iteration`, or to its next batch."""
        self._at = (iteration, time.time())

    def run(self) -> None:
        """The thread."""
        warned = None
        while not self._ended.is_set():
            at = self._at
            try:
                self._store.set(_key(self._rank), json.dumps(asdict(self._sign())))
                if self._rank == 0 and time.time() - at[1] > self._patience and warned != at:
                    warned = at
                    logger.warning("%s", self.describe())
            except RuntimeError:  # the store is gone, with whoever kept it: the run is ending
                return
            self._ended.wait(self.pause)

    def end(self) -> None:
        """The thread may end."""
        self._ended.set()

    def _sign(self) -> Sign:
        place, waits = _place(_calls(self._main_thread))
        return Sign(self._rank, *self._at, time.time(), place, waits or self.has_lost)

    def describe(self) -> str:
        """Who has not arrived, since when, and where it is, as this rank can know it."""
        written = [sign for rank in range(self._ranks) if (sign := self._read(rank)) is not None]
        signs = [self._sign() if sign.rank == self._rank else sign for sign in written]
        now, known = time.time(), {sign.rank for sign in signs}
        silent = [sign for sign in signs if now - sign.written > 3 * self.pause]
        latest = max(sign.iteration for sign in signs)
        busy = [sign for sign in signs if sign not in silent and (not sign.waits or sign.iteration < latest)]
        named = [
            *(
                f"rank {sign.rank} has given no sign of life for {now - sign.written:.0f} s; it was at "
                f"iteration {sign.iteration}, in {sign.place}"
                for sign in silent
            ),
            *(
                f"rank {sign.rank} has not arrived: it is at iteration {sign.iteration} for "
                f"{now - sign.since:.0f} s, in {sign.place}"
                for sign in busy
            ),
            *(f"rank {rank} has never begun" for rank in range(self._ranks) if rank not in known),
        ]
        if not named:
            places = sorted({sign.place for sign in signs})
            named = [f"all ranks wait for each other, in {' and '.join(places[:_NAMED])}"]
        more = f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        own = f"rank {self._rank} waits at iteration {self._at[0]} for {now - self._at[1]:.0f} s"
        return f"{own}: {'; '.join(named[:_NAMED])}{more}"

    def _read(self, rank: int) -> Sign | None:
        if not self._store.check([_key(rank)]):
            return None
        return Sign(**json.loads(self._store.get(_key(rank))))


def _key(rank: int) -> str:
    return f"heartbeats/{rank}"


@dataclass(frozen=True)
class _Call:
    """What a thread is in."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


def _calls(thread: int) -> list[_Call]:
    """The calls that a thread is in, innermost first; none of a thread that has ended.

    `faulthandler` writes them in one piece. Frame objects of a thread that runs on must not be walked: with
    Python 3.11, `f_back` has crashed the process.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        stacks = file.read().split("\n\n")
    own = next((stack for stack in stacks if f"hread 0x{thread:016x} " in stack), "")
    return [_Call(*call) for call in _CALL.findall(own)]


def _place(calls: list[_Call]) -> tuple[str, bool]:
    """The innermost function of a thread, with that of this package that led to it; whether the thread waits
    for other ranks."""
    if not calls:
        return "nowhere", False
    innermost = calls[0]
    waits = _WAITING.search(innermost.file) is not None
    waits = waits or any("/torch/distributed/" in call.file for call in calls)
    ours = next((call for call in calls if call.file.startswith(_OURS)), innermost)
    called = "" if ours is innermost else f", called by {ours}"
    return f"{innermost}{called}", waits


def _ignored(_iteration: int) -> None:
    """Of a run of one process nobody waits for a sign."""


@contextmanager
def heartbeats(timeout_minutes: float) -> Iterator[Callable[[int], None]]:
    """Signs of life while the context is open, which all ranks enter. The main thread calls what this yields
    when it has come to an iteration, or goes on within it.

    `timeout_minutes` is that of collectives. Raises LostRankError, which says which rank is missing, for the
    failure of a collective inside of the context.
    """
    if dist.get_world_size() == 1:
        yield _ignored
        return
    # a connection of its own: another may be waiting for something
    store: Any = dist.distributed_c10d._get_default_store()
    beats = Heartbeats(store.clone(), timeout_minutes)
    thread = threading.Thread(target=beats.run, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield beats.at
    except RuntimeError as error:
        if not _COLLECTIVE_FAILURE.search(str(error)):
            raise
        beats.has_lost = True
        time.sleep(4 * beats.pause)  # until a rank that has just ended is silent
        raise LostRankError(f"{_described(beats)} ({_reason(error)})") from error
    finally:
        beats.end()
        thread.join(beats.pause)


def _reason(error: RuntimeError) -> str:
    """What torch says, without the place in its sources and advice of its own."""
    return re.sub(r"^\[[^]]*\] |\. This is typically .*", "", str(error).splitlines()[0])


def _described(beats: Heartbeats) -> str:
    try:
        return beats.describe()
    except RuntimeError:
        return "another rank has ended, and with it what the ranks knew of each other"

"""Saves that are killed: the run goes on from the last good checkpoint, bit for bit, with nothing left over.

A training that saves every iteration, at once or in the background, is killed with SIGKILL, at a random
moment, or in front of the n-th file operation below its folder. The same command is then started again.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lckv_megatron.faults.children import Ending, in_child
from lckv_megatron.faults.damage import Step
from lckv_megatron.faults.tally import Tally, Verdict
from lckv_megatron.faults.training import ITERATIONS, digest, settings, train

_CHANGING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_SECONDS = 180.0

WAYS = ((1, False), (2, False), (1, True), (2, True))
"""Processes; whether saves go on in the background."""

Making = Callable[[Path], dict[str, Any]]
"""Makes the settings of a run that saves into a folder."""


def kills(work: Path, moments: int, most: int | None, seed: int, step: Step) -> Iterator[Tally]:
    """Kills trainings of one process in front of `most` of all file operations (None: of each), and of one
    and two processes at `moments` each, all with both ways of saving."""
    generator = random.Random(seed)
    for ranks, in_background in WAYS:
        run = partial(_run, in_background=in_background)
        way = "in background" if in_background else "at once"
        folder = work / f"straight-{ranks}-{way}"
        started = time.monotonic()
        _expect(run, folder, ranks)
        seconds, straight = time.monotonic() - started, digest(folder)
        tally = Tally(f"kills: {ranks} process(es), saves {way}, any moment")
        for _ in range(moments):
            delay = generator.uniform(0.3, 1.0) * seconds
            _killed(run, work, ranks, straight, f"after {delay:.2f} s", _at_moment(delay), tally)
            step(1)
        yield tally
        if ranks == 1:
            tally = Tally(f"kills: 1 process, saves {way}, file operations")
            yield _at_each_operation(run, work, straight, most, generator, step, tally)


def count(work: Path, moments: int, most: int | None) -> int:
    """How often `kills` will kill."""
    points = [
        _operations(partial(_run, in_background=in_background), work) if most is None else most
        for ranks, in_background in WAYS
        if ranks == 1
    ]
    return len(WAYS) * moments + sum(points)


def _operations(run: Making, work: Path) -> int:
    """How many file operations a training makes below its folder."""
    told = work / "operations"
    target = work / "counted"

    def counted() -> str:
        operations = [0]
        _on_operations(target, lambda: operations.__setitem__(0, operations[0] + 1))
        train(run(target))
        told.write_text(str(operations[0]))
        return ""

    ending = in_child(counted, seconds=_SECONDS)
    if ending.how != "value":
        raise RuntimeError(f"the training does not run: {ending.text}")
    shutil.rmtree(target)
    return int(told.read_text())


def _at_each_operation(
    run: Making,
    work: Path,
    straight: str,
    most: int | None,
    generator: random.Random,
    step: Step,
    tally: Tally,
) -> Tally:
    operations = _operations(run, work)
    chosen = range(operations)
    for number in chosen if most is None else sorted(generator.sample(chosen, min(most, operations))):
        fault = f"in front of operation {number} of {operations}"
        _killed(run, work, 1, straight, fault, _at_operation(number), tally)
        step(1)
    return tally


def _run(save: Path, *, in_background: bool) -> dict[str, Any]:
    checkpoint = {"save": str(save), "save_interval": 1, "keep_last": 2, "async_save": in_background}
    if (save / "latest").exists():
        checkpoint["load"] = str(save)
    return settings(checkpoint=checkpoint)


def _expect(run: Making, folder: Path, ranks: int) -> None:
    ending = _trained(run, folder, ranks)
    if ending.how != "value" or ending.text != str(ITERATIONS):
        raise RuntimeError(f"the training does not run: {ending.text}")


def _trained(
    make: Making, folder: Path, ranks: int, before: Callable[[Path], object] = lambda folder: None
) -> Ending:
    """A training of `ranks` processes to its end, or its death; `before` is called in rank 0."""
    port = _free_port()

    def run(rank: int) -> str:
        if rank == 0:
            before(folder)
        return train(make(folder), rank=rank, ranks=ranks, port=port)

    others = [_forked(lambda rank=rank: run(rank)) for rank in range(1, ranks)]  # type: ignore[misc]
    ending = in_child(lambda: run(0), seconds=_SECONDS)
    for other in others:
        if ending.how != "value":  # as torchrun does
            os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    return ending


def _forked(action: Callable[[], str]) -> int:
    child = os.fork()
    if child == 0:
        try:
            in_child(action, seconds=_SECONDS)
        finally:
            os._exit(0)
    return child


def _killed(
    run: Making,
    work: Path,
    ranks: int,
    straight: str,
    fault: str,
    before: Callable[[Path], object],
    tally: Tally,
) -> None:
    folder = work / "killed"
    _trained(run, folder, ranks, before)
    ending = _trained(run, folder, ranks)
    if ending.how != "value":
        tally.add(Verdict.WRONG, fault, f"does not go on: {ending.how}: {ending.text}")
    elif difference := _difference(straight, digest(folder)):
        tally.add(Verdict.WRONG, fault, difference)
    else:
        tally.add(Verdict.HARMLESS, fault, "")
    shutil.rmtree(folder)


def _difference(straight: str, reached: str) -> str:
    """In what a folder differs. Older checkpoints may be left: a run that is done does not clean up."""
    wanted, there = json.loads(straight), json.loads(reached)
    for result in (wanted, there):
        result["names"] = [name for name in result["names"] if not re.fullmatch(r"iter_\d+", name)]
    return "; ".join(
        f"{key} {there[key]} instead of {wanted[key]}" for key in wanted if there[key] != wanted[key]
    )


def _at_moment(delay: float) -> Callable[[Path], object]:
    def arm(_: Path) -> None:
        signal.signal(signal.SIGALRM, lambda *_: _die())
        signal.setitimer(signal.ITIMER_REAL, delay)

    return arm


def _at_operation(number: int) -> Callable[[Path], object]:
    def arm(folder: Path) -> None:
        left = [number]

        def operate() -> None:
            if left[0] == 0:
                _die()
            left[0] -= 1

        _on_operations(folder, operate)

    return arm


def _on_operations(folder: Path, action: Callable[[], object]) -> None:
    """Calls `action` in front of each operation of this process that changes something below a folder."""
    prefix = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGING or (event == "open" and _for_writing(arguments))
        if changes and any(
            str(part).startswith(prefix) for part in arguments if isinstance(part, str | Path)
        ):
            action()

    sys.addaudithook(hook)


def _for_writing(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port

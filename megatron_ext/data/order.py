"""In which order a run reads its training data, and how a resumed run goes on in it.

The order is that of `samples` and `blends`: each source epoch after epoch, dealt out by the weights. It
begins at some sample of the run, with some samples of each source read before. So weights and sources may
change while every other source goes on where it stood. What cannot go on within an epoch is a source whose
samples come in another order or are others: another seed, seq_length, split or other documents. At the end
of an epoch it can.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any, Self

import numpy as np

from megatron_ext.data.blends import deal_samples
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """A dataset of the order."""

    prefix: str
    content: str
    """`DocumentRange.content`: what its documents are."""
    seed: int
    seq_length: int
    per_epoch: int
    """Samples in an epoch."""
    weight: float
    """Its part of the samples, of any sum."""
    before: int = 0
    """Samples of it that were read before the order begins."""

    def check(self) -> None:
        """Raises ValueError for values that cannot be."""
        counts = (self.seed, self.seq_length, self.per_epoch, self.before)
        texts = isinstance(self.prefix, str) and isinstance(self.content, str)
        weighs = isinstance(self.weight, int | float) and 0 < self.weight < math.inf
        if not (texts and weighs and all(map(_is_count, counts)) and self.per_epoch and self.seq_length):
            raise ValueError(f"{self} cannot be")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class TrainingOrder:
    """The order of the samples `first_sample`, first_sample + 1, ... of a run."""

    first_sample: int
    sources: tuple[Source, ...]
    left_out: tuple[Source, ...] = ()
    """Sources that were read before the order begins and are not now; they may come back."""

    def read_until(self, consumed_samples: int) -> list[int]:
        """How many samples of each source the run has read with its first `consumed_samples`."""
        dealt = consumed_samples - self.first_sample
        counts = [dealt]
        if len(self.sources) > 1:
            source, _ = deal_samples([source.weight for source in self.sources], dealt)
            counts = np.bincount(source, minlength=len(self.sources)).tolist()
        return [source.before + count for source, count in zip(self.sources, counts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "first_sample": self.first_sample,
            "sources": [asdict(source) for source in self.sources],
            "left_out": [asdict(source) for source in self.left_out],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ConfigError for anything else."""
        try:
            sources, left_out = (
                tuple(Source(**source) for source in values[name]) for name in ("sources", "left_out")
            )
            order = cls(values["first_sample"], sources, left_out)
            if not sources or not _is_count(order.first_sample):
                raise ValueError(f"{len(sources)} datasets, from sample {order.first_sample!r} on")
            for source in (*sources, *left_out):
                source.check()
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the checkpoint's order of the training data cannot be read ({error}); load another "
                "checkpoint, or start afresh from its weights with checkpoint.finetune."
            ) from error
        return order


@dataclass(frozen=True)
class SourceUse:
    """What a run draws from one dataset of a split, from its first iteration to its last."""

    prefix: str
    samples: int
    per_epoch: int
    """Samples in an epoch; 0: there is no end to them."""


@dataclass(frozen=True)
class Continuation:
    """From where a resumed run goes on in its data."""

    consumed_samples: int
    order: TrainingOrder | None
    """That of the run so far; None: it is not known, and taken to be that of the present settings."""
    allow_changed_data: bool
    """`data.allow_changed_data`."""


def continue_order(
    present: TrainingOrder, resumed: Continuation | None
) -> tuple[TrainingOrder, tuple[str, ...]]:
    """The order of a run whose settings call for `present` when they begin a run, and sentences about what
    has changed.

    Raises ConfigError where a source cannot go on where it stood, unless that is allowed; then it goes on at
    the same part of its epoch.
    """
    if resumed is None or resumed.order is None:
        return present, ()
    before = resumed.order
    if _deals_alike(before, present):
        # Only paths can differ; the order keeps those that the samples are read from now.
        sources = zip(before.sources, present.sources, strict=True)
        kept = tuple(replace(old, prefix=new.prefix) for old, new in sources)
        return replace(before, sources=kept), tuple(_moved(before.sources, present.sources))
    return _Succession(before, present, resumed.consumed_samples).order(allowed=resumed.allow_changed_data)


def _deals_alike(one: TrainingOrder, other: TrainingOrder) -> bool:
    keys = [
        [(source.content, source.seed, source.seq_length) for source in order.sources]
        for order in (one, other)
    ]
    return keys[0] == keys[1] and _shares(one) == _shares(other)


def _shares(order: TrainingOrder) -> list[float]:
    weights = np.array([source.weight for source in order.sources], np.float64)
    return (weights / weights.sum()).tolist()


def _moved(before: Sequence[Source], after: Sequence[Source]) -> Iterator[str]:
    for old, new in zip(before, after, strict=True):
        if old.prefix != new.prefix:
            yield f"{new.prefix} has the documents of {old.prefix} and goes on where that stood."


class _Succession:
    """One order after another, from sample `consumed` on."""

    def __init__(self, before: TrainingOrder, present: TrainingOrder, consumed: int) -> None:
        read = zip(before.sources, before.read_until(consumed), strict=True)
        self._known = [*(replace(source, before=count) for source, count in read), *before.left_out]
        """All that was ever read, as it stands now."""
        self._present, self._consumed = present, consumed
        self._losses: list[str] = []
        self._notes: list[str] = []

    def order(self, *, allowed: bool) -> tuple[TrainingOrder, tuple[str, ...]]:
        """`continue_order`."""
        pairs = self._pairs()
        if not pairs:
            names = ", ".join(source.prefix for source in self._known)
            self._losses.append(f"none of the checkpoint's training data, {names}, is among that of this run")
        sources = tuple(
            replace(
                source, before=self._begin(source, self._known[pairs[number]] if number in pairs else None)
            )
            for number, source in enumerate(self._present.sources)
        )
        goes_on = {*pairs.values()}
        left_out = tuple(
            old for number, old in enumerate(self._known) if old.before and number not in goes_on
        )
        self._notes += [f"{old.prefix} is left out after {old.before:,} samples." for old in left_out]
        if self._losses and not allowed:
            raise ConfigError(
                "the run cannot go on in its training data where the checkpoint stands:\n"
                + "\n".join(f"  {loss}." for loss in self._losses)
                + "\nSet back what changed; or start afresh from the weights with checkpoint.finetune; or "
                "set data.allow_changed_data to go on with the run, each dataset at the same part of its "
                "epoch."
            )
        self._notes += [f"{loss} (data.allow_changed_data is set)." for loss in self._losses]
        return TrainingOrder(self._consumed, sources, left_out), tuple(self._notes)

    def _pairs(self) -> dict[int, int]:
        """Which of the known sources each of the present ones was: the one with its documents, best under its
        path; else the one at its path."""
        ours, known = (
            [(source.content, os.path.realpath(source.prefix)) for source in sources]
            for sources in (self._present.sources, self._known)
        )
        pairs: dict[int, int] = {}
        keys: tuple[Callable[[tuple[str, str]], Any], ...] = (tuple, itemgetter(0), itemgetter(1))
        for key in keys:
            taken = {*pairs.values()}
            free: dict[Any, list[int]] = {}
            for number, source in enumerate(known):
                if number not in taken:
                    free.setdefault(key(source), []).append(number)
            for number, source in enumerate(ours):
                if number not in pairs and free.get(key(source)):
                    pairs[number] = free[key(source)].pop(0)
        return pairs

    def _begin(self, source: Source, old: Source | None) -> int:
        """How many samples of a source count as read."""
        if old is None:
            self._notes.append(f"{source.prefix} is new and begins with its first sample.")
            return 0
        self._notes += _moved([old], [source])
        changes = list(_changes(old, source))
        if not changes:
            self._notes.append(f"{source.prefix} goes on after {old.before:,} samples.")
            return old.before
        epoch, place = divmod(old.before, old.per_epoch)
        if place:
            twice = min(place, old.per_epoch - place) * old.seq_length
            self._losses.append(
                f"{source.prefix}: {' and '.join(changes)}, and the run is within epoch {epoch + 1}, after "
                f"{place:,} of {old.per_epoch:,} samples, whose order is lost: up to {twice:,} tokens would "
                "be read twice in this epoch, and as many not at all"
            )
        return epoch * source.per_epoch + math.ceil(place * source.per_epoch / old.per_epoch)


def _changes(old: Source, new: Source) -> Iterator[str]:
    """Why the samples of a source come in another order, or are others."""
    for name in ("seed", "seq_length"):
        values = getattr(old, name), getattr(new, name)
        if values[0] != values[1]:
            yield f"train.{name} was {values[0]} and is {values[1]}"
    if old.content != new.content:
        yield "its documents are others than before (its files, data.split or data.chat_overlong changed)"

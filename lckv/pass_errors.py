"""How far the shared keys and values of one pass over a cyclic group are from those of another, as numbers to
report and as a loss.

The error of an estimate y' of y is sum (y' - y)^2 / sum y^2 over the tokens of a row and the channels of a
head, of keys and of values, and the mean of both. Keys are compared after RoPE, which turns both alike.

Shapes: s tokens, b rows, g KV heads, d channels of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from lckv.config import CompressionConfig
from lckv.policies.base import Statistic, Statistics

Pair = tuple[Tensor, Tensor]
"""Keys and values [s, b, g, d]."""
Sum = Callable[[Tensor], Tensor]
"""Over processes that have parts of the same rows."""

_GUESS = Statistic("first_guess_error", "relative squared error of the first guess")
_AGREEMENT = Statistic("pass_disagreement", "relative squared difference of the last two passes")


class Reporter(Protocol):
    """Who says what the layers' statistics are, and what of them is a loss: a KV policy, or `PassErrors`."""

    per_rank: bool
    """See `KVPolicy.per_rank`."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What layers report, in this order."""
        ...

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor | None:
        """See `KVPolicy.auxiliary_loss`."""
        ...

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """See `KVPolicy.report`."""
        ...


@dataclass(frozen=True)
class PassErrors:
    """The errors that `compression` asks for."""

    compression: CompressionConfig

    per_rank = False

    @cached_property
    def coefficients(self) -> Mapping[Statistic, float]:
        """Of each error in the loss."""
        compression, coefficients = self.compression, {}
        if compression.first_guess:
            coefficients[_GUESS] = compression.first_guess_loss_coefficient
        if compression.agreement_loss_coefficient:
            coefficients[_AGREEMENT] = compression.agreement_loss_coefficient
        return coefficients

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """See `Reporter`."""
        return tuple(self.coefficients)

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor | None:
        """See `Reporter`."""
        losses = [mean * weight for mean, weight in zip(means, self.coefficients.values(), strict=True)]
        return sum(losses[1:], losses[0]) if losses else None

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """The means over layers and heads, by name."""
        named = zip(self.statistics, means, strict=True)
        return {statistic.name: float(mean.mean()) for statistic, mean in named}


class PassRecord:
    """The keys and values of one micro-batch that are to be compared."""

    def __init__(self, errors: PassErrors, sources: Sequence[int]) -> None:
        """`sources`: layers that a layer below them reads (`LayerTypes.cyclic_sources`)."""
        self._errors, self._sources = errors, sources
        self._estimates: dict[tuple[Statistic, int], Pair] = {}

    def guessed(self, source: int, guess: Pair) -> Pair:
        """Note what was guessed of layer `source`; returns it for the passes to read, without gradient."""
        self._estimates[_GUESS, source] = guess
        return guess[0].detach(), guess[1].detach()

    def passed(self, source: int, own: Pair) -> None:
        """Note what layer `source` computed in a pass that does not count."""
        if source in self._sources and _AGREEMENT in self._errors.coefficients:
            self._estimates[_AGREEMENT, source] = own

    def statistics(
        self, source: int, last: Pair, counted: Tensor | None = None, total: Sum = lambda own: own
    ) -> Statistics:
        """The errors [b, g] of layer `source`, whose keys and values in the pass that counts are `last`: what
        this process's tokens add to those of the rows. () where there is nothing to compare.

        `counted` bool [s, b]: tokens that are not padding; None: all. `total`: see `Sum`. The first guess is
        compared with the numbers of `last` alone, so that it is pulled to them and not they to it."""
        errors: Statistics = ()
        for statistic in self._errors.statistics:
            estimate = self._estimates.get((statistic, source))
            if estimate is None:
                return ()
            target = (last[0].detach(), last[1].detach()) if statistic is _GUESS else last
            errors += (relative_error(estimate, target, counted, total),)
        return errors


def relative_error(
    estimate: Pair, target: Pair, counted: Tensor | None = None, total: Sum = lambda own: own
) -> Tensor:
    """float32 [b, g]; see the head of this file. No gradient flows through the denominator."""
    errors = []
    for guess, right in zip(estimate, target, strict=True):
        difference, size = guess.float() - right.float(), right.detach().float()
        if counted is not None:
            difference, size = (tensor * counted[:, :, None, None] for tensor in (difference, size))
        norm = total(size.square().sum((0, 3))).clamp(min=_TINY)
        errors.append(difference.square().sum((0, 3)) / norm)
    return (errors[0] + errors[1]) / 2


_TINY = 1e-12
"""In the place of the size of rows of padding."""


def reporter_of(compression: CompressionConfig) -> Reporter:
    """Who says what layers report under these settings: errors of passes, where they are asked for (then the
    KV policy keeps every token and reports nothing), else the KV policy."""
    errors = PassErrors(compression)
    return errors if errors.statistics else compression.policy.build()


def reporting_layers(compression: CompressionConfig, num_layers: int) -> tuple[int, ...]:
    """The layers that report, ascending."""
    layer_types = compression.map(num_layers)
    errors = PassErrors(compression).statistics
    return layer_types.cyclic_sources if errors else layer_types.kv_layers

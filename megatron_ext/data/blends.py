"""Which datasets a split draws from, in which proportion, and in which order.

Every sample has the same number of tokens, so weights, which are fractions of the tokens, are fractions of
the samples. Samples are dealt out one at a time, each to the source that is furthest behind its share. So the
first k samples of a blend do not depend on how many are drawn in all, and after any k a source is at most a
few samples off its share.
"""

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_ext.config import DataConfig
from megatron_ext.errors import ConfigError

SPLITS = ("train", "valid", "test")
MAX_SOURCES = 32767
"""megatron stores the number of a source in 16 bits."""


@dataclass(frozen=True)
class Blend:
    """Datasets, and their weights; without weights each counts by its size."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class SplitSources:
    """Where the samples of a split come from: a blend, and which part of each of its datasets' documents."""

    blend: Blend
    begin: float = 0.0
    end: float = 1.0

    def documents(self, count: int) -> tuple[int, int]:
        """First and last (exclusive) document of the part, of `count` documents; rounded as in megatron."""
        return round(self.begin * count), round(self.end * count)


def parse_blend(field: str, entries: Sequence[str]) -> Blend | None:
    """Read PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...; None if there is nothing. An entry may hold
    several of these words.

    `field` is the setting's name, for the message of the ConfigError that is raised for anything else.
    """
    if not entries:
        return None
    entries = [word for entry in entries for word in _words(str(entry).strip())]
    numbers = [_number(entry) for entry in entries]
    weights: tuple[float, ...] | None = None
    prefixes = tuple(entries)
    if any(number is not None for number in numbers):
        for place, number in enumerate(numbers):
            if (number is None) == (place % 2 == 0):
                wanted = "a weight" if place % 2 == 0 else "a prefix"
                raise ConfigError(
                    f"{field}: entry {place + 1} is {entries[place]!r}, but {wanted} belongs there. Give "
                    "PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ..."
                )
        if len(entries) % 2:
            raise ConfigError(f"{field}: no prefix follows the last weight, {entries[-1]}.")
        weights = tuple(number for number in numbers[::2] if number is not None)
        prefixes = tuple(entries[1::2])
        for weight, prefix in zip(weights, prefixes, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(
                    f"{field}: the weight of {prefix} is {weight:g}, but must be > 0. Leave out what has "
                    "none."
                )
    _check_prefixes(field, prefixes)
    return Blend(prefixes, weights)


def _words(entry: str) -> list[str]:
    """The words of an entry: one, unless it begins with a weight or names datasets that are there. A path may
    hold spaces: a dataset of the whole name comes first."""
    try:
        words = shlex.split(entry)
    except ValueError:  # a quotation mark in a path
        words = entry.split()
    if len(words) < 2 or _is_dataset(entry):
        return [entry]
    return words if _number(words[0]) is not None or all(map(_is_dataset, words)) else [entry]


def _is_dataset(prefix: str) -> bool:
    return os.path.isfile(f"{prefix}.bin")


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def _check_prefixes(field: str, prefixes: Sequence[str]) -> None:
    if "" in prefixes:
        raise ConfigError(f"{field}: prefix {prefixes.index('') + 1} is empty.")
    first: dict[str, str] = {}
    for prefix in prefixes:
        place = os.path.realpath(f"{prefix}.bin")
        if place in first:
            same = "" if first[place] == prefix else f" (the same dataset as {first[place]})"
            raise ConfigError(
                f"{field}: {prefix} is given twice{same}. Give it once, with the sum of the weights."
            )
        first[place] = prefix
    if len(prefixes) > MAX_SOURCES:
        raise ConfigError(
            f"{field}: {len(prefixes)} datasets, but at most {MAX_SOURCES} can be blended. Merge some of "
            "them."
        )


def parse_split(split: str) -> tuple[float, float, float, float]:
    """Where training, validation and test begin and the last ends, as fractions of the documents: 0, ..., 1.

    `split` has their shares, such as "969,30,1"; shares that are not given are 0.
    """
    numbers = [_number(part) for part in split.split(",")]
    shares = [number for number in numbers if number is not None and number >= 0 and math.isfinite(number)]
    if len(shares) < len(numbers) or not 1 <= len(shares) <= 3 or sum(shares) <= 0:
        raise ConfigError(
            f"data.split={split!r} must be one to three shares >= 0 with a sum > 0: training, validation, "
            "test, as in 969,30,1."
        )
    return 0.0, shares[0] / sum(shares), sum(shares[:2]) / sum(shares), 1.0


def split_sources(data: DataConfig) -> list[SplitSources | None]:
    """Sources of the training, validation and test split; None for a split that has none.

    Raises ConfigError for settings that contradict each other or cannot be read, all of them in one message.
    """
    problems: list[str] = []

    def read(field: str) -> Blend | None:
        try:
            return parse_blend(f"data.{field}", getattr(data, field))
        except ConfigError as error:
            problems.append(str(error))
            return None

    common = read("data_path")
    own = [read(f"{split}_data_path") for split in SPLITS]
    bounds = (0.0, 1.0, 1.0, 1.0)
    try:
        bounds = parse_split(data.split)
    except ConfigError as error:
        problems.append(str(error))
    given = [f"data.{split}_data_path" for split in SPLITS if getattr(data, f"{split}_data_path")]
    if data.data_path and given:
        problems.append(
            f"data.data_path and {given[0]} are both given. Give data_path with split, or a path for each "
            "split."
        )
    if not data.data_path and not data.train_data_path:
        problems.append("data.data_path, data.train_data_path and data.mock are all unset. Set one of them.")
    if problems:
        raise ConfigError("\n".join(problems))
    if common is None:
        return [None if blend is None else SplitSources(blend) for blend in own]
    return [SplitSources(common, begin, end) if end > begin else None for begin, end in pairwise(bounds)]


def deal_samples(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Source (int16 [size]) of each sample of a blend, and its number among the samples
    of that source (int64 [size])."""
    from megatron.core.datasets import helpers

    source, number = np.zeros(size, np.int16), np.zeros(size, np.int64)
    shares = np.array(weights, np.float64) / np.sum(weights)
    helpers.build_blending_indices(source, number, shares, len(weights), size, False)
    return source, number


def deal_all_samples(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Like `deal_samples` with the sizes as weights,
    until every source has given each of its samples once."""
    from megatron.core.datasets import helpers

    source, number = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
    helpers.build_exhaustive_blending_indices(source, number, np.array(sizes, np.int64), len(sizes))
    return source, number


def deal_without_repeats(weights: Sequence[float], sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Like `deal_samples`, as long as no source has to give one of its `sizes` samples again."""
    enough = math.ceil(min(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True)))
    source, number = deal_samples(weights, enough + len(weights))
    repeats = np.flatnonzero(number >= np.array(sizes)[source])
    end = repeats[0] if len(repeats) else len(source)
    return source[:end], number[:end]

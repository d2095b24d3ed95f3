"""Several models through all measures, in turns; one row for each number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lckv_megatron.measuring.admission import (
    Committed,
    allocated_bytes,
    cache_for,
    committed,
    fill,
    largest_batch,
)
from lckv_megatron.measuring.measures import Decoding, FirstToken, Prefill
from lckv_megatron.measuring.operations import prefill_flops
from lckv_megatron.measuring.subjects import Subject
from lckv_megatron.measuring.timing import median_seconds, peak_bytes
from lckv_megatron.tables import size
from megatron_ext.errors import ConfigError

OF_LARGEST_BATCH = ("largest decode step", "tokens per second", "decode memory")
"""Measures that each model is taken at its own largest batch for."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    lengths: Sequence[int]
    """Of prompts, in tokens."""
    context: int
    """Tokens of a sequence that others are decoded with."""
    batches: Sequence[int]
    """Sequences at once."""
    memory_bytes: int
    """Budget for the cache."""
    tolerance: float
    """Of prompts through iterated layers; see `lckv.generation.prefill.Settling`."""
    repeats: int
    clock: str
    """One of lckv_megatron.measuring.timing.CLOCKS."""

    @property
    def steps(self) -> int:
        """Tokens that a sequence is decoded by."""
        return self.steps_of(self.repeats)

    @staticmethod
    def steps_of(repeats: int) -> int:
        """In warm-up, in the rounds, and once more for its memory."""
        return repeats + 2


class Row(NamedTuple):
    """One number."""

    model: str
    measure: str
    at: int
    """Tokens of the prompt or of the context, or sequences at once."""
    value: float
    unit: str
    ratio: float
    """To the first model's number."""


def rows(measure: str, at: int | Mapping[str, int], unit: str, values: Mapping[str, float]) -> list[Row]:
    """One for each model, the first of which is what the others are compared with."""
    first = next(iter(values.values()))
    return [
        Row(
            name,
            measure,
            at if isinstance(at, int) else at[name],
            value,
            unit,
            value / first if first else 1.0,
        )
        for name, value in values.items()
    ]


def compare(subjects: Sequence[Subject], settings: Settings) -> Iterator[list[Row]]:
    """All rows, those of a measure together, as they are found."""
    for length in settings.lengths:
        yield from prefill(subjects, length, settings)
    for length in settings.lengths:
        calls = {subject.name: FirstToken(subject, length, settings.tolerance) for subject in subjects}
        yield _milliseconds("first token", length, calls, settings)
    yield from decoding(subjects, settings)


def prefill(subjects: Sequence[Subject], length: int, settings: Settings) -> Iterator[list[Row]]:
    """Reading a prompt of `length` tokens."""
    calls = {subject.name: Prefill(subject, length, settings.tolerance) for subject in subjects}
    yield _milliseconds("prefill", length, calls, settings)
    flops = {
        subject.name: prefill_flops(subject.model.config, length, calls[subject.name].passes)
        for subject in subjects
    }
    yield rows("prefill operations", length, "GFLOP", {name: count / 1e9 for name, count in flops.items()})
    yield rows("prefill passes", length, "", {name: call.passes for name, call in calls.items()})
    yield rows("tokens per slot", length, "", {name: call.compression_ratio for name, call in calls.items()})
    yield rows(
        "prefill memory", length, "MiB", {name: peak_bytes(call) / 2**20 for name, call in calls.items()}
    )
    iterated = [subject for subject in subjects if subject.model.model.layer_types.any_cyclic]
    if iterated:
        compared = [subjects[0], *(subject for subject in iterated if subject is not subjects[0])]
        calls = {subject.name: Prefill(subject, length, 0.0) for subject in compared}
        yield _milliseconds("prefill, all passes", length, calls, settings)
        flops = {
            subject.name: prefill_flops(subject.model.config, length, calls[subject.name].passes)
            for subject in compared
        }
        yield rows(
            "operations, all passes", length, "GFLOP", {name: count / 1e9 for name, count in flops.items()}
        )


def decoding(subjects: Sequence[Subject], settings: Settings) -> Iterator[list[Row]]:
    """Batches: how large they can be and how fast they are."""
    context, memory = settings.context, settings.memory_bytes
    largest: dict[str, int] = {}
    kv_bytes: dict[str, float] = {}
    begun: dict[str, list[Committed]] = {}
    for subject in subjects:
        name, model, prompts = subject.name, subject.model, subject.prompts
        whole, begun[name] = (
            committed(model, prompts[:, :length]) for length in (context, context - settings.steps)
        )
        largest[name] = batch = largest_batch(
            model, (whole, begun[name]), memory_bytes=memory, max_tokens=context
        )
        if batch == 0:
            raise ConfigError(
                f"--memory {size(memory)} does not hold one sequence of {context} tokens of {name}; give "
                "more, or a smaller --context."
            )
        cache = cache_for(model, batch, context, memory)
        fill(cache, batch, whole)
        kv_bytes[name] = allocated_bytes(cache, batch) / (batch * context)
    yield rows("KV bytes per token", context, "bytes", kv_bytes)
    yield rows("largest batch", context, "sequences", largest)
    for batch in settings.batches:
        calls = {
            subject.name: Decoding(subject, batch, begun[subject.name], max_tokens=context)
            for subject in subjects
        }
        yield _milliseconds("decode step", batch, calls, settings)
    calls = {
        subject.name: Decoding(
            subject, largest[subject.name], begun[subject.name], max_tokens=context, memory_bytes=memory
        )
        for subject in subjects
    }
    seconds = median_seconds(calls, repeats=settings.repeats, clock=settings.clock)
    yield rows("largest decode step", largest, "ms", {name: 1e3 * value for name, value in seconds.items()})
    speed = {name: len(calls[name].sequences) / value for name, value in seconds.items()}
    yield rows("tokens per second", largest, "1/s", speed)
    yield rows(
        "decode memory", largest, "MiB", {name: peak_bytes(call) / 2**20 for name, call in calls.items()}
    )


def _milliseconds(
    measure: str, at: int, calls: Mapping[str, Callable[[], None]], settings: Settings
) -> list[Row]:
    seconds = median_seconds(calls, repeats=settings.repeats, clock=settings.clock)
    return rows(measure, at, "ms", {name: 1e3 * value for name, value in seconds.items()})

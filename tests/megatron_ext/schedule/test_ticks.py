"""The list of a step's work: every need is met, bounds hold, all ranks agree, and the stages rarely wait."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.schedule.ticks import Leg, Tick, Ticks, Work, schedule


def ring(stages: int, passes: int, *, arrives: bool = False) -> tuple[Leg, ...]:
    """`passes` around a ring; `arrives`: the last one back to where it began."""
    legs = [Leg(stage, 1.0) for _ in range(passes) for stage in range(stages)]
    return (*legs, *([Leg(0, 0.0)] if arrives and passes else []))


def step(stages: int, m: int, b: int, micro_batches: int, in_flight: int, **options: bool) -> Ticks:
    return schedule(ring(stages, m, arrives=True), ring(stages, b), micro_batches, in_flight, **options)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Ticks, int, int, int, int, int, bool]:
    stages, m, b = draw(st.integers(2, 8)), draw(st.integers(0, 7)), draw(st.integers(1, 3))
    micro_batches, in_flight = draw(st.integers(1, 32)), draw(st.integers(1, 16))
    forward_only = draw(st.booleans())
    ticks = step(stages, m, b, micro_batches, in_flight, forward_only=forward_only)
    return ticks, stages, m, b, micro_batches, in_flight, forward_only


@settings(max_examples=20)
@given(steps())
def test_every_need_is_met_and_every_bound_holds(
    drawn: tuple[Ticks, int, int, int, int, int, bool],
) -> None:
    ticks, stages, m, b, micro_batches, in_flight, forward_only = drawn
    at = {(tick.work, tick.micro_batch, tick.visit): tick for tick in ticks.ticks}
    assert len(at) == len(ticks.ticks), "nothing is done twice"
    counts = Counter(tick.work for tick in ticks.ticks)
    assert counts[Work.PREPARE] == micro_batches * (m * stages + bool(m))
    assert counts[Work.FORWARD] == micro_batches * b * stages
    assert counts[Work.BACKWARD] == (0 if forward_only else micro_batches * b * stages)
    for tick in ticks.ticks:
        assert all(at[need].end <= tick.start for need in needs(tick, m, b, stages))
    assert ticks.in_flight <= in_flight
    assert ticks.ahead <= 3 * stages
    for stage in range(stages):
        mine = ticks.of_stage(stage)
        assert all(one.end <= other.start for one, other in pairwise(mine))


def needs(tick: Tick, m: int, b: int, stages: int) -> list[tuple[Work, int, int]]:
    """What comes before."""
    last_visit = b * stages - 1
    if tick.work is Work.BACKWARD:
        after = [] if tick.visit == last_visit else [(Work.BACKWARD, tick.micro_batch, tick.visit + 1)]
        return [(Work.FORWARD, tick.micro_batch, tick.visit), *after]
    if tick.visit:
        return [(tick.work, tick.micro_batch, tick.visit - 1)]
    prepares = tick.work is Work.FORWARD and m
    return [(Work.PREPARE, tick.micro_batch, m * stages)] if prepares else []


@settings(max_examples=20)
@given(steps())
def test_messages_wait_for_nothing_that_waits_for_them(
    drawn: tuple[Ticks, int, int, int, int, int, bool],
) -> None:
    """Every stage starts what it sends and receives in the order of the list, between its work: play that."""
    ticks = drawn[0]
    assert [message.time for message in ticks.messages] == sorted(message.time for message in ticks.messages)
    done: set[tuple[Work, int, int]] = set()
    came: set[tuple[Work, int, int]] = set()
    events = sorted(
        [(tick.start, 1, tick.end, number) for number, tick in enumerate(ticks.ticks)]
        + [(message.time, 0, 0.0, number) for number, message in enumerate(ticks.messages)]
    )
    # at equal times a message goes before the work that starts then, unless work without length makes it
    for _, is_work, _, number in events:
        if is_work:
            tick = ticks.ticks[number]
            key = (tick.work, tick.micro_batch, tick.visit)
            expects = {(m.work, m.micro_batch, m.visit) for m in ticks.messages if m.target == tick.stage}
            assert key not in expects or key in came
            done.add(key)
        else:
            message = ticks.messages[number]
            before = message.visit + (1 if message.work is Work.BACKWARD else -1)
            assert (message.work, message.micro_batch, before) in done
            came.add((message.work, message.micro_batch, message.visit))


def test_the_bubble_of_four_stages_is_small() -> None:
    assert step(4, 7, 2, 16, 4).bubble <= 0.08
    assert step(4, 7, 2, 16, 8).bubble <= 0.05


def test_work_of_one_micro_batch_is_done_alone() -> None:
    ticks = step(2, 1, 1, 1, 2)
    assert ticks.length == 2 + 2 + 4
    assert ticks.bubble == pytest.approx(0.5)


def test_uneven_stages() -> None:
    train = (Leg(0, 3.0), Leg(1, 1.0))
    ticks = schedule((), train, 4, 4)
    assert ticks.length >= 4 * 9
    assert ticks.bubble > 1 / 3


@pytest.mark.parametrize(("micro_batches", "in_flight"), [(0, 1), (1, 0)])
def test_numbers_below_one(micro_batches: int, in_flight: int) -> None:
    with pytest.raises(ValueError, match="is 0; it must be at least 1"):
        step(2, 1, 1, micro_batches, in_flight)

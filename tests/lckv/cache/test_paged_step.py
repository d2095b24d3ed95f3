"""Steps of one token per row: planned, run and settled, against a model on `PagedRows`; and captured."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lckv.cache.paged import PagedCache
from lckv.cache.paged_step import PagedStep
from lckv.models.decoding import Decoder
from tests.lckv.cache.models import CASES, MIXED_CASES, logits, model, paged_cache, text
from tests.lckv.cache.tape import Tape, WaitingError

LENGTHS = (21, 3, 12)
"""Of the texts before the first step."""
STEPS = 9


def filled(name: str, policy: str, **sizes: int) -> tuple[PagedCache, list[int]]:
    """A cache that holds texts of these lengths."""
    cache = paged_cache(model(name, policy), **sizes)
    sequences = [cache.open() for _ in LENGTHS]
    for number, length in zip(sequences, LENGTHS, strict=True):
        logits(model(name, policy), [text(length, number)], cache.rows([number]))
    return cache, sequences


def token(step: int) -> list[int]:
    return [(7 * step + 11 * row) % 50 for row in range(len(LENGTHS))]


@torch.inference_mode()
def run(decoder: Decoder, step: PagedStep, sequences: Sequence[int], tokens: Sequence[int]) -> Tensor:
    assert step.plan(sequences)
    padded = [*tokens, *(0,) * (step.rows - len(tokens))]
    states = decoder(torch.tensor(padded), step)
    step.settle()
    return states[: len(tokens)]


def everything(cache: PagedCache, sequences: Sequence[int]) -> list[Tensor]:
    """What a cache says of its sequences, and all slots in use."""
    memory = cache._memory
    of_slots = []
    for number, table in enumerate(memory.tables.table):
        for sequence in sequences:
            for head, length in enumerate(memory.tables.lengths[number, sequence]):
                pages = table[sequence, head].long()
                pools = (memory.pool.key, memory.pool.value)
                of_slots += [pool[pages].flatten(0, 1)[:length] for pool in pools]
    state = [] if memory.state is None else [memory.state[:, :, sequences]]
    return [memory.lengths[:, sequences], memory.seen[sequences], *state, *of_slots]


@pytest.mark.parametrize(("name", "policy"), [*CASES, *MIXED_CASES, ("LCKV", "dms")])
@pytest.mark.parametrize("rows", [3, 4], ids=["exact", "fixed"])
def test_steps_equal_the_model_on_rows(name: str, policy: str, rows: int) -> None:
    cache, sequences = filled(name, policy)
    other, _ = filled(name, policy)
    built = model(name, policy)
    decoder, step = Decoder(built.model), cache.step(rows, fixed=rows > len(LENGTHS))
    for number in range(STEPS):
        tokens = token(number)
        expected = logits(built, [[one] for one in tokens], other.rows(sequences))
        with torch.inference_mode():
            found = built.lm_head(run(decoder, step, sequences, tokens))
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    for one, expected_one in zip(everything(cache, sequences), everything(other, sequences), strict=True):
        torch.testing.assert_close(one, expected_one, rtol=1e-4, atol=1e-5)
    memory = cache._memory
    assert np.array_equal(memory.tables.lengths[:, sequences], memory.lengths[:, sequences].numpy())
    assert not memory.pool.key[0].any() and not memory.pool.value[0].any()
    for sequence in sequences:
        cache.close(sequence)
    assert cache.pages_free == cache.pages


@pytest.mark.parametrize(
    ("name", "policy"),
    [("plain", "dense"), ("LCKV", "dense"), ("sliding cyclic", "dense"), ("LCKV", "dmc"), ("CLA", "dms")],
)
def test_a_captured_step_equals_the_eager_one_bit_for_bit(name: str, policy: str) -> None:
    """Operators of one step, on the same memory with what later plans say; none of them asks the device."""
    built = model(name, policy)
    decoder = Decoder(built.model)
    caches = [filled(name, policy) for _ in range(2)]
    steps = [cache.step(4, fixed=True) for cache, _ in caches]
    sequences = caches[0][1]
    tokens = torch.zeros(4, dtype=torch.int64)
    for number in range(2):  # the first one makes what later ones fill
        for (_, own), step in zip(caches, steps, strict=True):
            run(decoder, step, own, token(number))
    tape = Tape()
    for number in range(2, STEPS):
        expected = run(decoder, steps[0], sequences, token(number))
        assert steps[1].plan(sequences)
        tokens[:3] = torch.tensor(token(number))
        with torch.inference_mode():
            if not len(tape):
                shape = steps[1].shape
                with tape:
                    output = decoder(tokens, steps[1])
                found = output
            else:
                found = tape.replay()[id(output)]
        steps[1].settle()
        assert steps[1].shape == shape
        assert torch.equal(found[:3], expected)
    for one, other in zip(*(everything(*of_cache) for of_cache in caches), strict=True):
        assert torch.equal(one, other)


def test_the_tape_refuses_what_waits() -> None:
    with pytest.raises(WaitingError), Tape():
        bool(torch.ones(3).any())


def test_lists_of_work_get_more_room_and_say_so() -> None:
    """A head of up to 64 slots is one chunk on a CPU: six heads have six, and ten when all are longer but
    those of the row of three tokens."""
    cache, sequences = filled("plain", "dense", pages=2000, max_tokens=200)
    step = cache.step(3, fixed=True)
    assert step.shape == (3,)
    run(Decoder(model("plain").model), step, sequences, token(0))
    shapes = []
    for _ in range(60):
        assert step.plan(sequences)
        step.settle()
        shapes.append(step.shape)
    assert shapes == [(3, 8)] * shapes.count((3, 8)) + [(3, 16)] * shapes.count((3, 16))
    assert shapes.count((3, 8)) == 52  # rows of 22 and 13 tokens need two chunks each before the 53rd


def test_pages_are_taken_ahead_once() -> None:
    """A step that fails leaves what it has reserved; the next one takes no more."""
    cache, sequences = filled("plain", "dense")
    step, free = cache.step(3), cache.pages_free
    assert cache.pages_needed(sequences, 1) == 8  # rows of 12 tokens have full pages of 4: 4 layers, 2 heads
    assert step.plan(sequences) and cache.pages_free == free - 8
    assert step.plan(sequences) and cache.pages_free == free - 8
    assert cache.pages_needed(sequences, 1) == 0
    logits(model("plain"), [[one] for one in token(0)], cache.rows(sequences))
    assert cache.pages_free == free - 8
    for sequence in sequences:
        cache.close(sequence)
    assert cache.pages_free == cache.pages


def test_no_plan_without_room() -> None:
    cache, sequences = filled("plain", "dense", pages=88)
    assert cache.pages_free == 88 - 8 * (6 + 1 + 3)
    cache.open()
    extra = cache.step(1)
    full = cache.step(3)
    assert full.plan(sequences)  # the last eight pages
    full.settle()
    free = cache.pages_free
    assert free == 0 and not extra.plan([3]) and cache.pages_free == 0
    assert not cache.step(1).plan([sequences[0]]) or cache.pages_free == 0


def test_no_plan_beyond_the_longest_sequence() -> None:
    cache, sequences = filled("plain", "dense", max_tokens=21)
    assert not cache.step(3).plan(sequences)
    assert cache.step(1).plan(sequences[1:2])

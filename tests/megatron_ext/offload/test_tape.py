"""A row of token-wise and whole parts against the same functions without a tape."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ext.offload.host_pool import HostPool
from megatron_ext.offload.tape import Storage, Tape
from megatron_ext.offload.tokens import Tokens
from megatron_ext.offload.transfer import Buffers, Link

COUNT, BATCH, WIDTH = 6, 2, 4
SHARES = (0.0, 0.5, 1.0)


def storage() -> Storage:
    cpu = torch.device("cpu")
    link = Link(cpu)
    return Storage(HostPool(2**20, pinned=False), link, Buffers(cpu, link))


def tape_of(where: Storage, share: float, *weights: Tensor, before: Tape | None = None) -> Tape:
    tokens = Tokens.of(torch.empty(COUNT, BATCH, WIDTH), shards=1, share=share)
    return Tape(where, tokens, weights, before)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def check(
    function: Callable[[Tape | None, Tensor, Tensor], Tensor], share: float, rows: int = WIDTH
) -> Storage:
    """The gradients of `function(tape, x, weight)` with a tape are those without."""
    x, weight, where = draw(COUNT, BATCH, WIDTH), draw(rows, WIDTH), storage()
    expected = torch.autograd.grad(function(None, x, weight).square().sum(), (x, weight))
    with tape_of(where, share, weight) as tape:
        result = function(tape, x, weight)
    gradients = torch.autograd.grad(result.square().sum(), (x, weight))
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)
    return where


def part(
    tape: Tape | None, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> tuple[Tensor, ...]:
    return function(*inputs) if tape is None else tape.token_wise(function, *inputs)


@pytest.mark.parametrize("share", SHARES)
def test_views_and_gaps(share: float) -> None:
    """Halves of a tensor, a transposed one, and one that is saved twice."""

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        first, second = (x @ weight.t()).chunk(2, -1)
        wide = first.sigmoid() * second
        return (wide * wide * x.permute(0, 2, 1).exp().permute(0, 2, 1)[..., :2],)

    check(lambda tape, x, weight: part(tape, lambda y: function(y, weight), x)[0], share)


@pytest.mark.parametrize("share", SHARES)
def test_an_output_that_another_part_saves(share: float) -> None:
    def function(tape: Tape | None, x: Tensor, weight: Tensor) -> Tensor:
        first, second = part(tape, lambda y: (y @ weight.t(), y + 1), x)
        if tape is None:
            mixed = first.cumsum(0) * second
        else:
            with tape.whole():
                mixed = first.cumsum(0) * second
        return part(tape, lambda y, z: (y.exp() * z,), mixed, x)[0]

    check(function, share)


@pytest.mark.parametrize("share", SHARES)
def test_as_many_rows_as_tokens_by_chance(share: float) -> None:
    """What is made from a weight has rows, and these are no tokens."""

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (x @ (weight * 2.0).exp().t(),)

    check(lambda tape, x, weight: part(tape, lambda y: function(y, weight), x)[0], share, rows=COUNT * BATCH)


def test_only_the_tail_is_computed_again() -> None:
    seen = []

    def function(tape: Tape | None, x: Tensor, weight: Tensor) -> Tensor:
        def counted(y: Tensor) -> tuple[Tensor]:
            seen.append(len(y))
            return ((y @ weight.t()).exp(),)

        return part(tape, counted, x)[0]

    for share in SHARES:
        check(function, share)
    assert seen == [COUNT, COUNT, COUNT, COUNT, COUNT, COUNT - 3, COUNT, COUNT]


def test_what_nobody_needs_any_more_is_not_computed_again() -> None:
    """The last product of a part saves its factors; its result, and what follows, is not asked for."""
    steps = []

    def function(tape: Tape | None, x: Tensor, weight: Tensor) -> Tensor:
        def told(y: Tensor) -> tuple[Tensor]:
            steps.append("product")
            product = y.exp() @ weight.t()
            steps.append("result")
            return (product + 1,)

        return part(tape, told, x)[0]

    check(function, 0.0)
    assert steps == ["product", "result"] * 2 + ["product"]


def test_layers_come_back_in_turns_and_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    where, weight = storage(), draw(WIDTH, WIDTH)
    states, tape, names = draw(COUNT, BATCH, WIDTH), None, {}
    log: list[str] = []
    places: list[int] = []
    load = Tape.load

    def logged(tape: Tape, memory: Tensor, link: Link) -> None:
        log.append(f"load {names[id(tape)]}")
        places.append(memory.data_ptr())
        load(tape, memory, link)

    def layer(number: int) -> Callable[[Tensor], tuple[Tensor]]:
        def function(y: Tensor) -> tuple[Tensor]:
            log.append(f"compute {number}")
            return ((y @ weight.t()).sigmoid(),)

        return function

    monkeypatch.setattr(Tape, "load", logged)
    for number in range(4):
        tape = tape_of(where, 0.5, weight, before=tape)
        names[id(tape)] = number
        with tape:
            (states,) = tape.token_wise(layer(number), states)
    del tape
    log.clear()
    assert where.pool.used > 0
    states.sum().backward()
    assert log == [
        "load 3", "load 2", "compute 3", "load 1", "compute 2", "load 0", "compute 1", "compute 0",
    ]  # fmt: skip
    assert places[0] == places[2] != places[1] == places[3], "two buffers"
    assert where.pool.used == 0

"""The two levels, on steps that are followed by hand."""

from itertools import combinations, pairwise

from lckv_megatron.memory_plan.blocks import StepPlacement, _place_kind, cut, kept_sizes, place_step
from lckv_megatron.memory_plan.rank import plan_rank
from lckv_megatron.memory_plan.report import GAINS_FROM, kind_rows, plan_rows, verdict
from lckv_megatron.memory_plan.requests import Request, live_peak
from lckv_megatron.memory_plan.trace import Stretch, Trace

MIB = 2**20
LAYERS = 3
FORWARD, BACKWARD, HEAD = 10, 20, 4
"""Events of a layer and of what lies between the last forward and the first backward."""


def step(layers: int = LAYERS) -> tuple[list[Request], list[Stretch]]:
    """Each layer keeps 4 and 2 MiB and its output of 3 MiB, which the layer above is done with first; it
    needs 8 MiB for a while going forward, and 16 going back, where it hands a gradient of 3 MiB down."""
    requests, stretches = [Request(30 * MIB, layers * FORWARD, layers * FORWARD + 3)], []
    top = layers * FORWARD + HEAD
    for layer in range(layers):
        start = layer * FORWARD
        back = top + (layers - 1 - layer) * BACKWARD
        stretches.append(Stretch("layer", layer + 1, layer, "forward", start, start + FORWARD))
        stretches.append(Stretch("layer", layer + 1, layer, "backward", back, back + BACKWARD))
        requests += [
            Request(4 * MIB, start + 1, back + 8),
            Request(8 * MIB, start + 2, start + 9),
            Request(2 * MIB, start + 4, back + 12),
            Request(1000, start + 6, back + 9),
            Request(3 * MIB, start + 7, back - 2 if layer < layers - 1 else back + 1),
            Request(16 * MIB, back + 3, back + 10),
            Request(512, back + 4, back + 5),
            Request(3 * MIB, back + 11, back + BACKWARD + 2),
        ]
    return requests, stretches


def require_sound(requests: list[Request], placed: StepPlacement) -> None:
    assert {*placed.addresses} == {*requests}
    for (first, low), (second, other) in combinations(placed.addresses.items(), 2):
        apart = low + first.bytes <= other or other + second.bytes <= low
        assert apart or not first.overlaps(second)
    assert placed.peak == max(address + request.bytes for request, address in placed.addresses.items())


def test_layers_that_are_alike_are_of_one_kind() -> None:
    requests, stretches = step()
    blocks, loose = cut(requests, stretches, whole=True)
    assert [(block.name, len(block.requests)) for block in blocks] == [
        ("layer", 7), ("layer", 7), ("layer", 7), ("between layers", 1),
    ]  # fmt: skip
    assert [request.bytes for request in loose] == [3 * MIB] * LAYERS  # gradients
    assert [request.bytes for request in blocks[0].kept] == [4 * MIB, 2 * MIB, 1000, 3 * MIB]
    parts, loose = cut(requests, stretches, whole=False)
    assert [(block.name, len(block.requests)) for block in parts if block.forward.layer == 1] == [
        ("layer, kept", 4), ("layer, forward", 1), ("layer, backward", 2),
    ]  # fmt: skip
    assert len(loose) == LAYERS
    placed = place_step(requests, stretches)
    require_sound(requests, placed)
    (kind,) = [kind for kind in placed.kinds if kind.name in ("layer", "layer, kept") and kind.blocks > 1]
    assert kind.blocks == LAYERS - 1  # the last layer's output goes in its own backward


def test_a_block_has_its_own_time() -> None:
    requests, stretches = step()
    blocks, _ = cut(requests, stretches, whole=True)
    first, _, last, between = (
        [(request.bytes // MIB, request.start, request.end) for request in block.local()] for block in blocks
    )
    assert first == [(4, 1, 18), (8, 2, 9), (2, 4, 22), (0, 6, 19), (3, 7, 10), (16, 13, 20), (0, 14, 15)]
    assert last[4] == (3, 7, 11)
    assert between == [(30, 0, 3)]


def test_what_outlives_its_backward_is_loose() -> None:
    requests, stretches = step()
    head = LAYERS * FORWARD + HEAD
    outliving = [
        Request(100, 2 * FORWARD + 2, head + 2 * BACKWARD + 5),  # until the backward of the first layer
        Request(200, 2 * FORWARD + 3, 2 * FORWARD + FORWARD + 1),  # until behind the last forward
    ]
    for whole in (True, False):
        blocks, loose = cut([*requests, *outliving], stretches, whole=whole)
        assert {*outliving} < {*loose}
        assert not {*outliving} & {request for block in blocks for request in block.requests}


def test_the_plan_of_a_step_reaches_the_live_peak() -> None:
    requests, stretches = step()
    placed = place_step(requests, stretches)
    require_sound(requests, placed)
    assert placed.peak == live_peak(requests)
    assert placed.kept == {request for request in requests if request.bytes in (4 * MIB, 2 * MIB, 1000)} | {
        request for request in requests if request.bytes == 3 * MIB and request.start < LAYERS * FORWARD
    }


def test_what_a_layer_keeps_has_no_holes_and_lies_lowest() -> None:
    blocks, _ = cut(*step(), whole=True)
    for block in blocks[:LAYERS]:
        kind, offsets = _place_kind([block], 1.0)
        address = dict(zip(block.requests, offsets, strict=True))
        lying = sorted((address[request], request.bytes) for request in block.kept)
        assert lying[0][0] == 0
        assert all(low + number == above for (low, number), (above, _) in pairwise(lying))
        assert kind.kept == 9 * MIB + 1000 < kind.live_peak <= kind.peak


def test_sizes_that_layers_keep() -> None:
    requests, stretches = step()
    sizes = kept_sizes(requests, stretches)
    assert sizes == dict.fromkeys((1, 2, 3), (4 * MIB, 2 * MIB, 1000, 3 * MIB))
    again = [Stretch("layer", 1, 9, "forward", 900, 910), Stretch("layer", 1, 9, "backward", 920, 930)]
    more = [*requests, Request(20 * MIB, 901, 925), Request(5 * MIB, 902, 905)]
    assert kept_sizes(more, [*stretches, *again])[1] == (20 * MIB,)


def test_requests_of_passes_without_gradient_are_loose_where_they_outlive_them() -> None:
    stretches = [Stretch("layer without gradient", 1, 0, "forward", 2, 8)]
    inside, output, outside = Request(5, 2, 7), Request(6, 3, 9), Request(7, 0, 12)
    blocks, loose = cut([inside, output, outside], stretches, whole=True)
    assert [block.requests for block in blocks] == [[inside]]
    assert loose == [outside, output]


def plan_of_a_step(persistent: int, before: int = 0):
    """The rank's plan; `before` are bytes that only the building of the model needed."""
    requests, stretches = step()
    length = 100

    def later(event: int) -> int:
        return event + 3

    end = length + 3
    program = [Request(persistent, 0, end), Request(max(1, before), 1, 2)]
    program += [Request(r.bytes, later(r.start), later(r.end)) for r in requests]
    moved = [Stretch(s.name, s.layer, s.run, s.direction, later(s.start), later(s.end)) for s in stretches]
    return plan_rank(5, Trace(program, moved, 3, end))


def test_the_plan_of_a_rank_is_compared_with_the_allocator() -> None:
    plan = plan_of_a_step(persistent=100 * MIB)
    requests, _ = step()
    assert plan.persistent == 100 * MIB
    assert plan.live_peak == plan.peak == 100 * MIB + live_peak(requests)
    assert plan.largest_kept == 9 * MIB + 1000
    assert plan.expandable.reserved >= plan.live_peak
    head, row = plan_rows([plan])
    told = dict(zip(head, row, strict=True))
    assert (told["rank"], told["above live"]) == ("5", "0.00 %")
    assert told["saved"] == f"{100 * (1 - plan.peak / plan.expandable.reserved):.2f} %"
    assert {row[0] for row in [*kind_rows(plan)][1:]} >= {"between layers"}


def test_the_verdict_says_whether_planning_is_worth_it() -> None:
    much, little = plan_of_a_step(10 * MIB, before=400 * MIB), plan_of_a_step(20_000 * MIB)
    assert little.gain < GAINS_FROM < much.gain
    assert verdict([little]).endswith(
        ": keep to them, as the launchers do (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)."
    )
    said = verdict([little, much])
    assert said.startswith(f"Planning saves {100 * much.gain:.1f} % of what expandable segments reserve, ")
    assert "keep to them" not in said

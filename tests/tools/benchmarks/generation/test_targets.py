"""What a small cache promises, where it does not depend on the machine: batches that fit, passes, operations,
memory of a step."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv_megatron.measuring.admission import cache_for, committed, fill, largest_batch
from lckv_megatron.measuring.measures import Decoding, Prefill
from lckv_megatron.measuring.operations import prefill_flops
from tests.tools.benchmarks.generation.test_models import LCKV_MERGING, PLAIN_MERGING, SIZES, build
from tools.benchmarks.generation.models import Sizes

KINDS = ("plain", "lckv", "yoco", PLAIN_MERGING, LCKV_MERGING)


@pytest.fixture(scope="module")
def batches() -> dict[str, int]:
    """Sequences of 1024 tokens that fit where 4 of a plain model of 22 layers do."""
    sizes = Sizes(22, hidden_size=16, heads=2, kv_heads=1, vocab_size=64, sliding_window=16, context=1024)
    subjects = {kind: build(kind, sizes) for kind in ("plain", "lckv", PLAIN_MERGING, LCKV_MERGING)}
    memory = cache_for(subjects["plain"].model, 4, 1024).num_bytes
    return {
        kind: largest_batch(
            each.model, [committed(each.model, each.prompts[:1])], memory_bytes=memory, max_tokens=1024
        )
        for kind, each in subjects.items()
    }


@pytest.mark.parametrize(
    ("kind", "times"), [("plain", 1), ("lckv", 7), (PLAIN_MERGING, 3.5), (LCKV_MERGING, 20)]
)
def test_so_many_more_sequences_fit(batches: dict[str, int], kind: str, times: float) -> None:
    assert batches["plain"] == 4
    assert batches[kind] >= 4 * times


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_batch_leaves_no_room_for_another_sequence(kind: str) -> None:
    model, prompts = build(kind).model, build(kind).prompts
    of_prompts = committed(model, prompts)
    memory = 3 * cache_for(model, 1, 256).num_bytes
    batch = largest_batch(model, [of_prompts], memory_bytes=memory, max_tokens=256)
    cache = cache_for(model, batch, 256, memory)
    assert cache.num_bytes <= memory
    fill(cache, batch, of_prompts)
    tables = (
        cache.bytes_per_sequence // cache.bytes_per_page + 1
    )  # pages that the tables of one more sequence cost
    needed = cache.pages_in_use // batch
    assert 0 <= cache.pages_free < needed + tables


def test_a_window_that_needs_one_page_more_on_the_way_counts() -> None:
    model, prompts = build("yoco").model, build("yoco").prompts
    aligned, before = (
        committed(model, prompts[:, :length]) for length in (256, 251)
    )  # of a window 15 tokens are kept
    memory = 4 * cache_for(model, 1, 256).num_bytes
    room = [
        largest_batch(model, each, memory_bytes=memory, max_tokens=256)
        for each in ([aligned], [before], [aligned, before])
    ]
    assert room[0] > room[1] == room[2]


def test_no_sequence_fits_into_nothing() -> None:
    subject = build(LCKV_MERGING)
    of_prompts = committed(subject.model, subject.prompts)
    assert largest_batch(subject.model, [of_prompts], memory_bytes=1000, max_tokens=256) == 0


@pytest.mark.parametrize("kind", ["lckv", "sandwich-middle", LCKV_MERGING])
@pytest.mark.parametrize("tolerance", [0.02, 0.0])
def test_a_prompt_takes_no_more_than_its_operation_count(kind: str, tolerance: float) -> None:
    plain, subject = build("plain"), build(kind)
    counted, predicted = [], []
    for each in (plain, subject):
        prefill = Prefill(each, 256, tolerance)
        with FlopCounterMode(
            display=False
        ) as counter:  # it knows nothing of attention on CPU, which has the same share in both
            prefill()
        counted.append(counter.get_total_flops())
        predicted.append(prefill_flops(each.model.config, 256, prefill.passes))
    passes = subject.model.model.forward_passes + subject.model.model.backward_passes
    assert prefill.passes == passes if tolerance == 0 else prefill.passes <= passes
    assert 0.9 < counted[1] / counted[0] / (predicted[1] / predicted[0]) < 1.1
    (group,) = {step.group for step in subject.model.model.steps if step.group.iterated}
    iterated = (group.stop - group.start) / len(subject.model.model.layers)
    assert counted[1] / counted[0] < 1.1 * (prefill.passes * iterated + 1 - iterated)


def decoding(kind: str, batch: int = 3, begun: int = 200) -> Decoding:
    subject = build(kind)
    return Decoding(subject, batch, committed(subject.model, subject.prompts[:, :begun]), max_tokens=256)


@pytest.mark.parametrize("kind", ["plain", "yoco", LCKV_MERGING])
def test_a_step_leaves_nothing_allocated(kind: str) -> None:
    step = decoding(kind)
    step()
    before = step.cache.num_bytes
    with profile(profile_memory=True) as profiled:
        for _ in range(17):  # more than a page
            step()
    results = profiled.kineto_results
    assert results is not None
    changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    assert len(changes) > 100
    # the newest plan's list of work is kept: three integers for each chunk of pages to look at
    assert sum(changes) in range(0, 1000, 3 * 8)
    assert step.cache.num_bytes == before


class _Work(TorchDispatchMode):
    """Counts operations and the numbers that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        self.numbers += sum(
            each.numel() for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, torch.Tensor)
        )
        return result


def work(step: Callable[[], object]) -> tuple[int, int]:
    with _Work() as counted:
        step()
    return counted.operations, counted.numbers


@pytest.mark.parametrize("kind", ["plain", LCKV_MERGING])
def test_a_step_costs_the_same_however_many_requests_are_finished(kind: str) -> None:
    model = build(kind).model
    found = []
    for finished in (0, 30):
        engine = Engine(model, EngineConfig(memory_bytes=2**22, max_batch_size=8, max_prompt_tokens=64))
        engine.generate(
            [[number % 7 + 1] * 20 for number in range(finished)],
            SamplingParams(temperature=0.0, max_new_tokens=3),
        )
        for prompt in ([1, 2, 3, 4], [5, 6, 7]):
            engine.submit(prompt, SamplingParams(temperature=0.0, max_new_tokens=50))
        for _ in range(4):
            engine.step()
        found.append(work(engine.step))
    assert found[0] == found[1]
    assert found[0][0] > 100


def test_where_pages_run_out_the_youngest_sequence_makes_room() -> None:
    subject = build("plain")
    begun = committed(subject.model, subject.prompts[:, :240])
    heads = SIZES.layers * SIZES.kv_heads
    memory = cache_for(subject.model, 3, 256, None)
    step = Decoding(
        subject, 3, begun, max_tokens=256, memory_bytes=memory.num_bytes - heads * memory.bytes_per_page
    )
    step()
    assert len(step.sequences) == 2
    assert step.cache.pages_in_use == 2 * heads * 16

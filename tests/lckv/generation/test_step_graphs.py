"""Steps that are captured once and launched again, with a stand-in for CUDA graphs."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lckv.cache.paged import PagedCache
from lckv.generation.forward import Forward
from lckv.generation.step_graphs import StepGraphs
from lckv.models.decoding import Decoder
from tests.lckv.cache.models import logits, model, paged_cache, text
from tests.lckv.cache.tape import Tape
from tests.lckv.generation.engines import GREEDY, empty, engine

LENGTHS = (21, 3, 12, 30)

PROMPTS = [text(length, seed=length) for length in (1, 7, 3, 9)]


class Captures:
    """Captures with a tape. What a run under it has changed in a cache is put back, as if it had not run."""

    def __init__(self, cache: PagedCache) -> None:
        self._memory, self.count, self.replays = cache._memory, 0, 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        memory = self._memory
        kept = [memory.pool.key, memory.pool.value, memory.lengths, memory.seen]
        kept += [] if memory.state is None else [memory.state]
        before = [tensor.clone() for tensor in kept]
        with Tape() as tape:
            output = run()
        for tensor, own in zip(kept, before, strict=True):
            tensor.copy_(own)
        self.count += 1

        def replay() -> Tensor:
            self.replays += 1
            return tape.replay()[id(output)]

        return replay


@pytest.mark.parametrize(
    ("name", "policy"), [("plain", "dense"), ("sliding cyclic", "dense"), ("LCKV", "dmc")]
)
def test_launched_steps_of_any_rows_equal_the_model(name: str, policy: str) -> None:
    """Sequences join and leave; each bucket is captured once."""
    built = model(name, policy)
    cache, other = paged_cache(built), paged_cache(built)
    for number, length in enumerate(LENGTHS):
        for one in (cache, other):
            sequence = one.open()
            logits(built, [text(length, number)], one.rows([sequence]))
    captures = Captures(cache)
    steps = StepGraphs(built, Decoder(built.model), cache, captures)
    rounds = [[0, 1, 2]] * 3 + [[2, 0, 3, 1]] * 2 + [[1]] * 3 + [[3, 1, 2]] * 2 + [[2, 3]] * 3
    for number, rows in enumerate(rounds):
        tokens = [(7 * number + 11 * row) % 50 for row in rows]
        expected = logits(built, [[token] for token in tokens], other.rows(rows))
        with torch.inference_mode():
            found = steps(rows, tokens)
        assert found is not None
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert captures.count == 3 and captures.replays == len(rounds) - 3  # buckets of 4, 1 and 2 rows
    assert torch.equal(cache._memory.lengths, other._memory.lengths)
    assert not cache._memory.pool.key[0].any()


@pytest.mark.parametrize(("name", "policy"), [("LCKV", "dense"), ("LCKV", "dmc")])
def test_an_engine_that_launches_steps_as_a_whole_answers_the_same(name: str, policy: str) -> None:
    built = model(name, policy)
    sampled = [replace(GREEDY, temperature=1.5, seed=seed) for seed in range(len(PROMPTS))]
    expected = [answer.token_ids for answer in engine(built).generate(PROMPTS, sampled)]
    tried = engine(built)
    captures = Captures(tried.cache)
    tried._forward = Forward(built, tried.cache, tolerance=0.0, capture=captures)
    assert [answer.token_ids for answer in tried.generate(PROMPTS, sampled)] == expected
    assert captures.replays > 5
    assert empty(tried)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graphs is set, but the model is on cpu; move it to a GPU"):
        engine(model("plain"), cuda_graphs=True)


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_hooks_on_layers_are_called(part: str) -> None:
    """A step calls the modules of layers, and not layers: where that would show it does not."""
    built = model("plain")
    layer = built.model.layers[1]
    seen: list[object] = []
    expected = engine(built).generate(PROMPTS[1:2], GREEDY)[0].token_ids
    module = layer if part == "layer" else layer.self_attn
    hook = module.register_forward_hook(lambda *arguments: seen.append(arguments[0]))
    try:
        assert engine(built).generate(PROMPTS[1:2], GREEDY)[0].token_ids == expected
    finally:
        hook.remove()
    assert len(seen) == GREEDY.max_new_tokens


def test_modules_that_are_exchanged_later_are_used() -> None:
    """As an adapter does that is loaded while an engine is there."""
    built = copy.deepcopy(model("plain"))
    tried = engine(built, prefix_cache=False)
    before = tried.generate(PROMPTS[1:2], GREEDY)[0].token_ids
    torch.manual_seed(1)
    attention = built.model.layers[1].self_attn
    attention.o_proj = torch.nn.Linear(32, 32, bias=False)
    after = tried.generate(PROMPTS[1:2], GREEDY)[0].token_ids
    assert after == engine(built).generate(PROMPTS[1:2], GREEDY)[0].token_ids != before

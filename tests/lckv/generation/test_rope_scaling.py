"""RoPE that depends on the length of a text, where keys are kept rotated: it is made for the longest text
that the cache takes, whatever the lengths of texts and pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.generation.unbounded import streaming_cache
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.cache.models import paged_cache
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, close, model, tokens
from tests.lckv.rope_parameters import longrope

LONGROPE = {
    "rope_parameters": {"rope_theta": 100.0, **longrope(8, 16)},
    "max_position_embeddings": 64,
}
DYNAMIC = {
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "dynamic", "factor": 3.0},
    "max_position_embeddings": 16,
}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (3, 8)]


@torch.no_grad()
def logits_within(one: LCKVLlamaForCausalLM, text: list[int], length: int) -> Tensor:
    """[tokens, V] of a text that goes on to `length` tokens, of which it sees nothing."""
    whole = torch.tensor([text + [1] * (length - len(text))])
    return one(whole, use_cache=False).logits[0, : len(text)]


@pytest.mark.parametrize(
    ("fields", "max_tokens", "made_for"),
    [
        (LONGROPE, None, 64),
        (LONGROPE, 17, 17),
        (LONGROPE, 16, 16),
        (DYNAMIC, None, 16),
        (DYNAMIC, 40, 40),
        (DYNAMIC, 100, 48),
    ],
)
def test_engine(fields: dict[str, Any], max_tokens: int | None, made_for: int) -> None:
    one = model(**fields)
    engines = [Engine(one, EngineConfig(max_tokens=max_tokens, prefill_chunk=chunk)) for chunk in (3, 512)]
    assert engines[0].limits.context == made_for
    answers = [engine.generate(PROMPTS, GREEDY) for engine in engines]
    for prompt, *found in zip(PROMPTS, *answers, strict=True):
        for answer in found:
            text = [*prompt, *answer.token_ids]
            logits = logits_within(one, text, made_for)
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(answer.token_ids)


def test_the_length_changes_what_is_computed() -> None:
    """Or the tests above would say nothing."""
    for one, longer in ((model(**LONGROPE), 17), (model(**DYNAMIC), 40)):
        text = tokens(1, 14)[0].tolist()
        assert (logits_within(one, text, 16) - logits_within(one, text, longer)).abs().max() > 1e-3


@pytest.mark.parametrize("policy", [None, MERGING], ids=["dense", "merging"])
@pytest.mark.parametrize("layer_types", [PLAIN, CYCLIC])
@pytest.mark.parametrize("fields", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
@torch.no_grad()
def test_pieces_equal_the_whole(fields: dict[str, Any], layer_types: str | None, policy: Any) -> None:
    one = model(layer_types, policy, **fields)
    embedded = one.model.embed_tokens(tokens(1, 12))
    whole: Tensor | None = None
    for sizes in ((12,), (5, 1, 6), (1,) * 12):
        cache = paged_cache(one, pages=200, max_sequences=1, max_tokens=40)
        rows = cache.rows([cache.open()])
        pieces = embedded.split(list(sizes), dim=1)
        found = [one.model.run(piece, rows).last_hidden_state for piece in pieces]
        whole = torch.cat(found, 1) if whole is None else whole
        close(torch.cat(found, 1), whole, 2e-4)


@pytest.mark.parametrize("fields", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
@torch.no_grad()
def test_sinks_and_a_window(fields: dict[str, Any]) -> None:
    """While all is kept, as for a text of as many tokens as are kept."""
    one, text = model(**fields), tokens(1, 14)[0].tolist()
    cache = streaming_cache(one, sinks=4, window=26)
    embedded = one.model.embed_tokens(torch.tensor([text]))
    found = [one.model.run(piece, cache).last_hidden_state for piece in embedded.split(5, dim=1)]
    close(one.lm_head(torch.cat(found, 1))[0], logits_within(one, text, 30), 2e-4)

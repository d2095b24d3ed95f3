"""Engines on tiny models with caches of any size."""

from typing import Any

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.cache.models import paged_cache

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True)


def engine(
    model: LCKVLlamaForCausalLM,
    *,
    pages: int = 2000,
    max_sequences: int = 8,
    tokenizer: Any = None,
    **settings: Any,
) -> Engine:
    """With all passes over iterated layers, unless told otherwise; sequences of up to 127 tokens in pages of
    4."""
    cache = paged_cache(model, pages=pages, max_sequences=max_sequences, max_tokens=127)
    return Engine(
        model, EngineConfig(**{"prefill_tolerance": 0.0, **settings}), tokenizer=tokenizer, cache=cache
    )


def empty(engine: Engine) -> bool:
    """Whether nothing is left of any request but what is kept for others, and then nothing at all."""
    stats = engine.stats()
    left = (stats.pages_in_use, stats.running, stats.waiting, engine.has_work)
    engine.clear_prefixes()
    return left == (0, 0, 0, False) and engine.cache.pages_free == engine.cache.pages

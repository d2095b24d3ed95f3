"""How many sequences of a length a cache of so many bytes holds: found by letting them in, one after the
other.

What a model makes of its prompts is computed once. Its keys, values and merge decisions are then committed
for as many sequences as there is room for: real heads of real lengths fill real pages,
without a forward pass for each.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lckv.cache.contiguous import ContiguousCache
from lckv.cache.paged import OutOfPagesError, PagedCache
from lckv.generation.memory import paged_cache
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.base import Extension

Committed = Mapping[int, Extension]
"""What each layer that computes keys and values has made of one sequence."""


class _Recorder(ContiguousCache):
    """Remembers what it is given instead of taking it in."""

    committed: Committed

    def commit(self, extensions: Committed, counted: Tensor | None) -> None:
        self.committed = extensions


@torch.inference_mode()
def committed(model: LCKVLlamaForCausalLM, prompts: Tensor) -> list[Committed]:
    """What a model commits of each of some texts int64 [rows, tokens]."""
    cache = _Recorder(model.model.layer_types.kv_layers, model.model.policy, {})
    of_texts = []
    for prompt in prompts:
        model.model.run(model.model.embed_tokens(prompt[None].to(model.device)), cache)
        of_texts.append(cache.committed)
    return of_texts


@torch.inference_mode()
def fill(cache: PagedCache, sequences: int, of_prompts: Sequence[Committed]) -> list[int]:
    """Let so many sequences in; their numbers. Raises OutOfPagesError where they find no room."""
    opened = []
    for number in range(sequences):
        opened.append(cache.open())
        cache.rows(opened[-1:]).commit(of_prompts[number % len(of_prompts)], None)
    return opened


def cache_for(
    model: LCKVLlamaForCausalLM, sequences: int, max_tokens: int, memory_bytes: int | None = None
) -> PagedCache:
    """An empty cache for so many sequences; default: of the most bytes that they can ever need. Raises
    ValueError where `memory_bytes` are too few for its tables."""
    return paged_cache(
        model.config,
        dtype=model.dtype,
        device=model.device,
        memory_bytes=2**62 if memory_bytes is None else memory_bytes,
        max_sequences=sequences,
        max_tokens=max_tokens,
    )


def largest_batch(
    model: LCKVLlamaForCausalLM,
    of_prompts: Sequence[Sequence[Committed]],
    *,
    memory_bytes: int,
    max_tokens: int,
) -> int:
    """Most sequences that a cache of `memory_bytes`, with tables for so many of up to `max_tokens`, takes in;
    0: not even one.

    `of_prompts` are the same texts at several lengths. There must be room for each length: a window may need
    a page more in between.
    """

    def fit(sequences: int) -> bool:
        for prompts in of_prompts:
            try:
                cache = cache_for(model, sequences, max_tokens, memory_bytes)
            except ValueError:  # the tables leave no room for pages
                return False
            try:
                fill(cache, sequences, prompts)
            except OutOfPagesError:
                return False
        return True

    low, high = 0, 1
    while fit(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def allocated_bytes(cache: PagedCache, sequences: int) -> int:
    """Of the pages in use, and of what `sequences` sequences take besides."""
    return cache.pages_in_use * cache.bytes_per_page + sequences * cache.bytes_per_sequence

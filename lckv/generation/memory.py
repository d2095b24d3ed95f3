"""A cache for a model, as large as memory allows."""

from bisect import bisect_right
from functools import partial

import torch

from lckv.cache.cost import CacheModel
from lckv.cache.paged import PagedCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig

_SHARE_OF_FREE_GPU_MEMORY = 0.8
"""The rest is for activations."""
_DEFAULT_BYTES_ON_CPU = 2**30


def paged_cache(
    config: LCKVLlamaConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory_bytes: int | None = None,
    page_size: int = 16,
    max_sequences: int = 64,
    max_tokens: int | None = None,
) -> PagedCache:
    """An empty cache of at most `memory_bytes`, tables and all, and not more than `max_sequences` of
    `max_tokens` (default: the model's context) can ever need. Default: 80 % of what is free on a GPU, 1 GiB
    elsewhere.

    Raises ValueError where not even one page for each KV head of a sequence fits.
    """
    compression = config.compression_config()
    layer_types = compression.map(config.num_hidden_layers)
    assert config.num_key_value_heads is not None and config.head_dim is not None
    max_tokens = config.max_position_embeddings if max_tokens is None else max_tokens
    make = partial(
        PagedCache,
        layers=layer_types.kv_layers,
        policy=compression.policy.build(),
        windows=compression.windows(config.num_hidden_layers),
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=device,
        page_size=page_size,
        max_tokens=max_tokens,
    )
    smallest = make(pages=1, max_sequences=1)
    if memory_bytes is None and device.type == "cuda":
        memory_bytes = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE_GPU_MEMORY)
    elif memory_bytes is None:
        memory_bytes = _DEFAULT_BYTES_ON_CPU
    heads = len(layer_types.kv_layers) * config.num_key_value_heads
    fixed = max_sequences * smallest.bytes_per_sequence + smallest.bytes_per_page
    pages = min(
        (memory_bytes - fixed) // smallest.bytes_per_page, heads * max_sequences * -(-max_tokens // page_size)
    )
    if pages < heads:
        raise ValueError(
            f"memory_bytes is {memory_bytes}; it must be at least {fixed + heads * smallest.bytes_per_page}: "
            f"{fixed} for the tables of {max_sequences} sequences (max_batch_size) of {max_tokens} tokens "
            f"(max_tokens), and a page for each of the {heads} KV heads that the model keeps."
        )
    return make(pages=pages, max_sequences=max_sequences)


def longest_sequence(cache: PagedCache, most: int) -> int:
    """Tokens, at most `most`, of the longest sequence that has room
    in an empty `cache` if every token is kept."""
    sequence = cache.open()
    try:
        return bisect_right(
            range(1, most + 1), cache.pages, key=lambda tokens: cache.pages_needed([sequence], tokens)
        )
    finally:
        cache.close(sequence)


def cache_model(config: LCKVLlamaConfig, dtype: str, page_size: int) -> CacheModel:
    """Of a model, without merging."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return CacheModel(
        num_layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        compression=config.compression_config(),
        dtype=dtype,
        page_size=page_size,
        compression_ratio=1.0,
    )

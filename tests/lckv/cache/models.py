"""Tiny models with every kind of map and policy, and what they say of a text in one piece."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lckv.cache.contiguous import ContiguousCache
from lckv.cache.paged import PagedCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM

VOCABULARY = 50

MAPS = {
    "plain": "0_1_2_3",
    "CLA": "0_0_2_2",
    "LCKV": "0_4_4_4_4_5",
    "YOCO": "0s_1s_2s_3_3_3",
    "sandwich": "0_2_2_2_4_5",
    "sliding cyclic": "0s_3s_3s_3s_4",
    "windowed and whole": "0_0s_2s_2s",
    "MLKV": "1_1_3_3",
    "without self": "0_0_2_2",
}
MIXING_MAPS = {
    "mixed": "0_1+0_2+1_2",
    "mixed cyclic": "0_3_3_3+0_4+3",
    "two sources": "0s_1s_1+0s_3_4_4/3_3+4",
}
"""For the few tests that layers which mix keys and values, or read two layers, could fail."""
DENSE = {"name": "dense"}
MERGING = {
    "name": "dmc",
    "stage": "finetune",
    "initial_decision_bias": 0.1,
    "window": 5,
    "target_compression_ratio": 2.0,
}
DROPPING = {
    "name": "dms",
    "stage": "finetune",
    "decision_scale": 30.0,
    "initial_decision_offset": 0.1,
    "window": 4,
}
POLICIES = {"dense": DENSE, "dmc": MERGING, "dms": DROPPING}

CASES = [
    (name, policy)
    for name in MAPS
    for policy in ("dense", "dmc")
    if policy == "dense" or "s" not in MAPS[name]
]


MIXED_CASES = [("mixed", "dense"), ("mixed cyclic", "dmc"), ("two sources", "dense")]


@cache
@torch.inference_mode(
    False
)  # a test may be the first that asks for it in that mode, and others need gradients
def model(name: str, policy: str = "dense", dtype: torch.dtype = torch.float32) -> LCKVLlamaForCausalLM:
    """A random model; about half of the tokens are merged or dropped, and no decision is close."""
    torch.manual_seed(0)
    layer_types = {**MAPS, **MIXING_MAPS}[name]
    config = LCKVLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layer_types.count("_") + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.15,
        compression={
            "layer_types": layer_types,
            "policy": POLICIES[policy],
            "sliding_window": 5 if "s" in layer_types else None,
            "force_nodiag": name == "without self",
        },
    )
    built = LCKVLlamaForCausalLM(config)
    with torch.no_grad():
        for layer in built.model.layers:
            if policy == "dmc" and layer.self_attn.computes_kv:
                layer.self_attn.k_proj.weight.unflatten(0, (2, 8))[:, -1] *= 20
            if layer.self_attn.mixes is not None:
                layer.self_attn.key_weight.copy_(torch.tensor([0.5, 0.8]) / 35)
                layer.self_attn.value_weight.copy_(torch.tensor([-0.6, 1.1]) / 35)
    return built.eval().to(dtype)


def cache_settings(built: LCKVLlamaForCausalLM) -> dict[str, object]:
    """Arguments of a cache for a model: layers, policy, windows."""
    compression = built.config.compression_config()
    layer_types = built.model.layer_types
    windows = {
        layer: compression.sliding_window
        for layer in layer_types.kv_layers
        if all(layer_types[reader].sliding for reader in layer_types.readers(layer))
    }
    return {"layers": layer_types.kv_layers, "policy": built.model.policy, "windows": windows}


def contiguous_cache(built: LCKVLlamaForCausalLM) -> ContiguousCache:
    return ContiguousCache(**cache_settings(built))


def paged_cache(
    built: LCKVLlamaForCausalLM, pages: int = 400, page_size: int = 4, **sizes: int
) -> PagedCache:
    return PagedCache(
        **cache_settings(built),
        kv_heads=built.config.num_key_value_heads,
        head_dim=built.config.head_dim,
        dtype=built.dtype,
        device="cpu",
        pages=pages,
        page_size=page_size,
        **{"max_sequences": 4, "max_tokens": 100, **sizes},
    )


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def logits(
    built: LCKVLlamaForCausalLM, rows: Sequence[Sequence[int]], cache: object, passes: int = 40
) -> list[Tensor]:
    """[tokens, vocabulary] of each row, of any lengths, which the cache takes in at once; enough passes to be
    exact."""
    width = max(len(row) for row in rows)
    padded = torch.tensor([[*row, *(0,) * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    counted = None if min(lengths) == width else torch.arange(width) < lengths[:, None]
    embedded = built.model.embed_tokens(padded)
    output = built.model.run(embedded, cache, counted=counted, iteration=Iteration(min(width, passes)))
    every = built.lm_head(output.last_hidden_state)
    return [of_row[: len(row)] for of_row, row in zip(every, rows, strict=True)]


@torch.inference_mode()
def parallel_logits(built: LCKVLlamaForCausalLM, tokens: Sequence[int]) -> Tensor:
    """[tokens, vocabulary] of a text without any cache."""
    return logits(built, [tokens], None)[0]

"""Every KV policy that is registered, found by discovery, and tiny models with them on every kind of map."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.base import KVPolicy
from lckv.policies.config import PolicyConfig
from lckv.policies.registry import config_class, config_classes

MAPS = {
    "plain": "0_1_2",
    "CLA": "0_0_2_2",
    "LCKV": "0_3_3_3",
    "sandwich": "0_2_2_3",
    "without self": "0_0_2",
}

OTHER_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dmc": [{"stage": "finetune", "initial_decision_bias": 0.1, "window": 5}],
    "dms": [
        {"stage": "finetune", "decision_scale": 30.0, "initial_decision_offset": 0.1, "window": 4},
        {
            "stage": "finetune",
            "decision_scale": 30.0,
            "initial_decision_offset": 0.1,
            "window": 4,
            "decision_source": "adapter",
        },
    ],
    "forgetful": [{"age": 1}, {"age": 9, "stride": 3}],
}
"""Settings to try besides the defaults, for those policies whose defaults do not do everything."""


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in config_classes():
        yield name, {}
        for number, settings in enumerate(OTHER_SETTINGS.get(name, []), 1):
            yield f"{name}-{number}", settings


SETTINGS = dict(_settings())
POLICIES = list(SETTINGS)
FEWER_MAPS = {"dms-2": ("plain", "CLA", "LCKV")}
"""For settings that differ from others only in what a layer computes by itself."""
CASES = [(policy, name) for policy in POLICIES for name in FEWER_MAPS.get(policy, MAPS)]


def policy_config(policy: str) -> PolicyConfig:
    """The settings of a case."""
    return config_class(policy.partition("-")[0])(**SETTINGS[policy])


def read_by(policy: KVPolicy, query: Tensor) -> Tensor | None:
    """What the policy reads: queries [s, b, 2 g, d], or in the place of its projection numbers of them."""
    return policy.traits.read(query, None if policy.traits.projection is None else query[:, :, ::2, :1])


def config(policy: str, name: str, **fields: Any) -> LCKVLlamaConfig:
    """Of a tiny model with grouped heads."""
    layer_types = MAPS[name]
    compression = {
        "layer_types": layer_types,
        "policy": asdict(policy_config(policy)),
        "force_nodiag": name == "without self",
        **fields.pop("compression", {}),
    }
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layer_types.count("_") + 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return LCKVLlamaConfig(**{**sizes, **fields}, compression=compression)


def fresh_model(policy: str, name: str, **fields: Any) -> LCKVLlamaForCausalLM:
    """In evaluation; always the same weights. A policy that decides in the last channel of keys has no close
    decisions, and parameters of its own are not the zeros that they begin as."""
    torch.manual_seed(0)
    built = LCKVLlamaForCausalLM(config(policy, name, **fields))
    with torch.no_grad():
        for layer in built.model.layers:
            if (own := layer.self_attn.projection) is not None:
                drawn = torch.Generator().manual_seed(2)
                getattr(layer.self_attn, own.name).weight.normal_(std=0.15, generator=drawn)
            if layer.self_attn.computes_kv:
                layer.self_attn.k_proj.weight.unflatten(0, (2, 8))[:, -1] *= 20
    return built.eval()


@cache
def model(policy: str, name: str) -> LCKVLlamaForCausalLM:
    """One that nobody changes."""
    return fresh_model(policy, name)

"""Attention functions of others: transformers' attention interface, through which vLLM runs a model with
`--model-impl transformers`.

A function of that interface sees the queries, keys and values of one layer, once. So it serves the maps whose
layers are walked once and whose keys are plain keys.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lckv.models.cache import CACHE_NAME
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig

OWN = {"eager": "reference", "sdpa": "sdpa", "flash_attention_2": "flash"}
"""Hugging Face's names of attention implementations, and those of `lckv.attention`."""

_OF_MASK = frozenset(inspect.signature(create_causal_mask).parameters)


class AttentionFunction(NamedTuple):
    """A function of others, and what it is called with beside a layer's queries, keys and values."""

    name: str
    """As in transformers' attention interface."""

    mask: Any
    """What `mask_for` returned."""

    arguments: Mapping[str, Any]
    """Arguments of the forward pass that the model itself does not know."""


def attention_function(config: LCKVLlamaConfig, obstacle: str | None) -> str | None:
    """The name of the attention function of others that the configuration asks for; None: it asks for one of
    `OWN`. `obstacle`: what `obstacle_to_functions` returned.

    Raises ValueError for a name that is not registered, and where no such function can serve the model."""
    name = config._attn_implementation or "sdpa"
    if name in OWN:
        return None
    if name not in ALL_ATTENTION_FUNCTIONS or name.startswith("paged|"):
        obstacle = (
            "transformers' attention interface has no such function for a model with a cache of its own"
        )
    if obstacle is not None:
        raise ValueError(
            f"attn_implementation is {name!r}, but {obstacle}; this model has {', '.join(OWN)}, and the "
            "engine of lckv.generation (`lckv-megatron serve`) serves every map."
        )
    return name


def obstacle_to_functions(config: LCKVLlamaConfig) -> str | None:
    """What keeps attention functions of others from serving the model; None if nothing does."""
    return next(_obstacles(config), None)


def check_no_cache(name: str, use_cache: bool | None, cache: object) -> None:
    """Raises ValueError where a cache is asked for: functions of others have none of this model's."""
    if use_cache or cache is not None:
        raise ValueError(
            f"{'use_cache is set' if cache is None else f'{CACHE_NAME} is given'}, but "
            f"attn_implementation is {name!r}, a function that does not read this model's cache: pass "
            f"use_cache=False, or set attn_implementation to one of {', '.join(OWN)}."
        )


def mask_for(
    config: LCKVLlamaConfig, embedded: Tensor, attention_mask: Tensor | None, position_ids: Tensor
) -> Any:
    """What the configured function wants as a mask: None where transformers has no kind of mask for it."""
    offered: dict[str, Any] = {
        "config": config,
        "inputs_embeds": embedded,
        "input_embeds": embedded,  # the name until transformers 5.2
        "attention_mask": attention_mask,
        "cache_position": position_ids[0],
        CACHE_NAME: None,
        "position_ids": position_ids,
    }
    return create_causal_mask(**{name: value for name, value in offered.items() if name in _OF_MASK})


def _obstacles(config: LCKVLlamaConfig) -> Iterator[str]:
    compression = config.compression_config()
    layer_types = compression.map(config.num_hidden_layers)
    traits = compression.policy.traits
    if layer_types.any_cyclic:
        yield (
            "layers of the map read keys and values of layers above them, in several passes; a function that "
            "sees each layer once cannot serve that"
        )
    if not traits.keeps_every_token or traits.key_bias is not None:
        yield f"it knows nothing of the KV policy {compression.policy.name}"
    for layer in layer_types:
        exclude_self, window = compression.sight(layer)
        if exclude_self:
            yield "force_nodiag hides every token's own key, which it cannot be told"
        if window is not None:
            yield "windowed layers stand in the map, which it does not read: they would see everything"

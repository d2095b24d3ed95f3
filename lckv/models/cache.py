"""The cache that Hugging Face's `generate` carries along:
one entry per layer that computes keys and values."""

from dataclasses import fields
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from lckv.cache.contiguous import ContiguousCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache from 5.24 on, and before. The models take it under either name."""
CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in CACHE_NAMES)
"""What the installed version calls it: the name in what models return."""


class LCKVCache(Cache):
    """What `generate` asks of a cache, around `ContiguousCache`.

    It counts columns of the batch (padding included), as `attention_mask` does;
    what is stored is only what attention needs.
    """

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(layers=[])
        self._config = config
        self.reset()

    def __repr__(self) -> str:
        return f"LCKVCache({self.slots.columns} columns, {self.slots.num_bytes} bytes)"

    def check_fits(self, config: LCKVLlamaConfig) -> None:
        """Raises ValueError unless models of `config` can read what this cache holds."""
        names = ("num_hidden_layers", "num_key_value_heads", "head_dim", "compression")
        for name in names:
            own, theirs = getattr(self._config, name), getattr(config, name)
            if own != theirs:
                raise ValueError(
                    f"{CACHE_NAME} is the cache of a model whose {name} is {own}; this model's is "
                    f"{theirs}: pass an LCKVCache(model.config), or None."
                )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far."""
        return self.slots.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """There is no maximum."""
        return -1

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not how this cache is filled; the model commits to `slots`."""
        raise TypeError(
            "LCKVCache is filled by LCKVLlamaForCausalLM only; other models need a cache of transformers."
        )

    def reset(self) -> None:
        """Forget everything."""
        compression = self._config.compression_config()
        num_layers, policy = self._config.num_hidden_layers, compression.policy.build()
        self._croppable = policy.traits.keeps_every_token
        self.slots = ContiguousCache(
            compression.map(num_layers).kv_layers, policy, compression.windows(num_layers)
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search."""
        self.slots.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self.slots.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        if not self.slots.empty:
            rows = torch.arange(self.batch_size, device=self.slots.seen.device)
            self.slots.select_rows(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (given as a negative number).
        Raises ValueError where tokens were merged or dropped."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}."
            )
        if tokens_to_remove < 0:
            self.slots.drop_newest(-tokens_to_remove)

    @property
    def batch_size(self) -> int:
        """Rows; -1 while the cache is empty."""
        return -1 if self.slots.empty else len(self.slots.seen)

    @property
    def is_compileable(self) -> bool:
        """Its tensors grow."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return not self.slots.empty

    @property
    def is_linear(self) -> list[bool]:
        """It has columns. `generate` counts none where every layer keeps a state instead, and there are no
        layers of transformers' kinds here to ask."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be forgotten again: only where every token is kept."""
        return self._croppable


def given_cache(cache: LCKVCache | None, past_key_values: LCKVCache | None) -> LCKVCache | None:
    """The one that was given, under either of its names. Raises ValueError for two."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: leave one of them out.")
    return past_key_values if cache is None else cache

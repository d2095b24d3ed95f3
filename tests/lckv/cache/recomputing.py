"""Streaming as it is said: keep tokens, rotate their keys to positions within the cache, and attend."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lckv.attention.visibility import Visibility
from lckv.policies.base import Extension
from lckv.rope import rotate, rotation
from lckv.sharing.mixing import Second


class RecomputingCache:
    """Implements `KVCache` for one token after the other. Keeps all tokens, of which it uses some;
    float64."""

    empty = False
    rope_length = None

    def __init__(self, rows: int, frequencies: Tensor, sinks: int, window: int) -> None:
        self.frequencies, self.sinks, self.window = frequencies.double(), sinks, window
        self.tokens = [0] * rows
        self.kept: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}
        """By layer and row: keys before RoPE and values of all tokens, [g, d]."""

    @property
    def seen(self) -> Tensor:
        """Queries and keys come unrotated, so to say: every token is at position 0."""
        return torch.zeros(len(self.tokens), dtype=torch.int64)

    def state(self, layer: int) -> None:
        return None

    def turned(self, heads: Tensor, position: int) -> Tensor:
        return rotate(heads.double(), rotation(torch.tensor(position), self.frequencies))

    def attend(
        self,
        layer: int,
        query: Tensor,
        new: Extension,
        counted: Tensor | None,
        visibility: Visibility,
        **options: object,
    ) -> Tensor:
        scale = options["scale"]
        output = torch.zeros_like(query, dtype=torch.float64)
        own_key, own_value = new.key[0], new.value[0]
        for row, token in enumerate(self.tokens):
            sinks, window = self.sinks, self.window
            if visibility.window is not None and visibility.window <= window:
                sinks, window = 0, visibility.window
            visible = [index for index in range(token + 1) if index < sinks or index > token - window]
            position = {index: place for place, index in enumerate(visible)}
            if visibility.exclude_self:
                visible.remove(token)
            if not visible:
                continue
            everything = [*self.read(layer, row, options.get("second")), (own_key[row], own_value[row])]
            group = query.shape[1] // own_key.shape[1]
            key = torch.stack([self.turned(everything[index][0], position[index]) for index in visible], 1)
            value = torch.stack([everything[index][1].double() for index in visible], 1)
            turned = self.turned(query[row, :, 0], position[token])
            scores = (key.repeat_interleave(group, 0) @ turned[..., None]).squeeze(-1) * scale
            output[row, :, 0] = (scores.softmax(-1)[:, None] @ value.repeat_interleave(group, 0)).squeeze(1)
        return output.to(query.dtype)

    def read(self, layer: int, row: int, second: Second | None) -> list[tuple[Tensor, Tensor]]:
        """Of earlier tokens of a row."""
        if layer not in self.kept:
            return []
        kept = self.kept[layer][row]
        if second is None:
            return kept
        others = self.kept[second.layer][row]
        if second.mixture is None:
            return [(key, value) for (key, _), (_, value) in zip(kept, others, strict=True)]
        of_keys, of_values = (weight * second.mixture.scaling_factor for weight in second.mixture[:2])
        return [
            (of_keys[1] * key + of_keys[0] * other_key, of_values[1] * value + of_values[0] * other_value)
            for (key, value), (other_key, other_value) in zip(kept, others, strict=True)
        ]

    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        for layer, extension in extensions.items():
            rows = self.kept.setdefault(layer, [[] for _ in self.tokens])
            for row, kept in enumerate(rows):
                kept.append((extension.key[0, row].clone(), extension.value[0, row].clone()))
        self.tokens = [token + 1 for token in self.tokens]

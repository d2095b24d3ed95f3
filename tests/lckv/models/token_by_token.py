"""A whole model from its formulas, in float64: one token after the other, one layer after the other."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM

KeyValue = tuple[Tensor, Tensor]
"""[g, d] each."""


class TokenByToken:
    """A model without KV policy, query norms and biases."""

    def __init__(self, model: LCKVLlamaForCausalLM) -> None:
        compression = model.config.compression
        self.config = model.config
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        entries = compression["layer_types"].split("_")
        self.entries = [entry.removesuffix("s") for entry in entries]
        self.windows = [compression["sliding_window"] if "s" in entry else 10**9 for entry in entries]
        self.factor = compression.get("mix_scaling_factor", 35.0)
        self.kept: list[list[KeyValue]] = [[] for _ in entries]

    def logits(self, text: list[int]) -> Tensor:
        """[tokens, vocabulary]."""
        return torch.stack([self.next(position, token) for position, token in enumerate(text)])

    def next(self, position: int, token: int) -> Tensor:
        states = self.weights["model.embed_tokens.weight"][token]
        before_rope: dict[int, KeyValue] = {}
        for layer in range(len(self.entries)):
            normed = self.norm(states, f"layers.{layer}.input_layernorm")
            if f"model.layers.{layer}.self_attn.k_proj.weight" in self.weights:
                own = self.heads(layer, "k", normed), self.heads(layer, "v", normed)
                first, _, other = self.entries[layer].partition("+")
                if other and int(first) == layer:
                    own = self.mixture(layer, own, before_rope[int(other)])
                before_rope[layer] = own
                self.kept[layer].append((self.turned(own[0], position), own[1]))
            attended = self.attended(layer, self.heads(layer, "q", normed), position)
            states = states + self.project(layer, "self_attn.o", attended.flatten())
            normed = self.norm(states, f"layers.{layer}.post_attention_layernorm")
            inner = silu(self.project(layer, "mlp.gate", normed)) * self.project(layer, "mlp.up", normed)
            states = states + self.project(layer, "mlp.down", inner)
        return self.weights["lm_head.weight"] @ self.norm(states, "norm")

    def attended(self, layer: int, query: Tensor, position: int) -> Tensor:
        cyclic = int(self.entries[layer].split("+")[0].split("/")[0]) > layer
        seen = range(max(0, position - self.windows[layer] + 1), position + (not cyclic))
        if not seen:
            return torch.zeros_like(query)
        key, value = (
            torch.stack(part).repeat_interleave(len(query) // len(part[0]), 1)
            for part in zip(*(self.read(layer, token) for token in seen), strict=True)
        )
        scores = torch.einsum("hd,thd->ht", self.turned(query, position), key) / self.config.head_dim**0.5
        return torch.einsum("ht,thd->hd", scores.softmax(1), value)

    def read(self, layer: int, token: int) -> KeyValue:
        """What the layer sees of a token."""
        entry = self.entries[layer]
        if "/" in entry:
            keys, values = map(int, entry.split("/"))
            return self.kept[keys][token][0], self.kept[values][token][1]
        first, *others = map(int, entry.split("+"))
        if first == layer or not others:
            return self.kept[first][token]
        return self.mixture(layer, self.kept[first][token], self.kept[others[0]][token])

    def mixture(self, layer: int, first: KeyValue, other: KeyValue) -> KeyValue:
        shares = (
            self.factor * self.weights[f"model.layers.{layer}.self_attn.{kind}_weight"]
            for kind in ("key", "value")
        )
        key, value = (w[0] * b + w[1] * a for w, a, b in zip(shares, first, other, strict=True))
        return key, value

    def heads(self, layer: int, kind: str, normed: Tensor) -> Tensor:
        return self.project(layer, f"self_attn.{kind}", normed).view(-1, self.config.head_dim)

    def project(self, layer: int, name: str, states: Tensor) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}_proj.weight"] @ states

    def norm(self, states: Tensor, name: str) -> Tensor:
        size = (states.pow(2).mean() + self.config.rms_norm_eps).sqrt()
        return states / size * self.weights[f"model.{name}.weight"]

    def turned(self, heads: Tensor, position: int) -> Tensor:
        half = self.config.head_dim // 2
        base = self.config.rope_parameters["rope_theta"]
        angles = position * base ** -(torch.arange(half).double() / half)
        pairs = torch.complex(heads[:, :half], heads[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), 1)

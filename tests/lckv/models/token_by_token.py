"""A whole model from its formulas, in float64: one token after the other, one layer after the other."""

import torch
from torch import Tensor

from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM


def logits_of(model: LCKVLlamaForCausalLM, text: list[int]) -> Tensor:
    """[tokens, vocabulary], of a model without KV policy, query norms and biases."""
    config, weights = model.config, {name: value.double() for name, value in model.state_dict().items()}
    compression = config.compression
    entries = [entry.removesuffix("s") for entry in compression["layer_types"].split("_")]
    windows = [
        compression["sliding_window"] if entry.endswith("s") else len(text)
        for entry in compression["layer_types"].split("_")
    ]
    factor, channels = compression.get("mix_scaling_factor", 35.0), config.head_dim
    angles = config.rope_parameters["rope_theta"] ** -(torch.arange(0, channels, 2).double() / channels)
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in range(len(entries))}

    def norm(states: Tensor, name: str) -> Tensor:
        size = (states.pow(2).mean() + config.rms_norm_eps).sqrt()
        return states / size * weights[f"model.{name}.weight"]

    def turned(heads: Tensor, position: int) -> Tensor:
        turn = torch.polar(torch.ones_like(angles), position * angles)
        pairs = torch.complex(heads[:, : channels // 2], heads[:, channels // 2 :]) * turn
        return torch.cat((pairs.real, pairs.imag), 1)

    def mixture(layer: int, kind: str, first: Tensor, other: Tensor) -> Tensor:
        share = weights[f"model.layers.{layer}.self_attn.{kind}_weight"] * factor
        return share[0] * other + share[1] * first

    def read(layer: int, token: int) -> tuple[Tensor, Tensor]:
        """Key and value [g, d] of an earlier token, or this one, as the layer sees them."""
        entry = entries[layer]
        if "/" in entry:
            keys, values = map(int, entry.split("/"))
            return kept[keys][token][0], kept[values][token][1]
        first, *others = map(int, entry.split("+"))
        if first == layer or not others:
            return kept[first][token]
        pairs = zip(kept[first][token], kept[others[0]][token], strict=True)
        return tuple(mixture(layer, kind, *pair) for kind, pair in zip(("key", "value"), pairs, strict=True))

    logits = []
    for position, token in enumerate(text):
        states, before_rope = weights["model.embed_tokens.weight"][token], {}
        for layer, entry in enumerate(entries):
            name = f"model.layers.{layer}"

            def heads(kind: str, name: str = name, states: Tensor = states, layer: int = layer) -> Tensor:
                normed = norm(states, f"layers.{layer}.input_layernorm")
                return (weights[f"{name}.self_attn.{kind}_proj.weight"] @ normed).view(-1, channels)

            if f"{name}.self_attn.k_proj.weight" in weights:
                key, value = heads("k"), heads("v")
                if entry.startswith(f"{layer}+"):
                    other = before_rope[int(entry.split("+")[1])]
                    key, value = mixture(layer, "key", key, other[0]), mixture(layer, "value", value, other[1])
                before_rope[layer] = key, value
                kept[layer].append((turned(key, position), value))
            cyclic = int(entry.split("+")[0].split("/")[0]) > layer
            seen = range(max(0, position - windows[layer] + 1), position + (not cyclic))
            attended = torch.zeros(config.num_attention_heads, channels, dtype=torch.float64)
            if len(seen):
                keys, values = (torch.stack(part) for part in zip(*(read(layer, t) for t in seen), strict=True))
                group = config.num_attention_heads // keys.shape[1]
                query = turned(heads("q"), position)
                scores = torch.einsum("hd,thd->ht", query, keys.repeat_interleave(group, 1)) / channels**0.5
                attended = torch.einsum("ht,thd->hd", scores.softmax(1), values.repeat_interleave(group, 1))
            states = states + weights[f"{name}.self_attn.o_proj.weight"] @ attended.flatten()
            normed = norm(states, f"layers.{layer}.post_attention_layernorm")
            gate, up = (weights[f"{name}.mlp.{part}_proj.weight"] @ normed for part in ("gate", "up"))
            states = states + weights[f"{name}.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        logits.append(weights["lm_head.weight"] @ norm(states, "norm"))
    return torch.stack(logits)

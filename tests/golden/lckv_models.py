"""The models recorded in golden/lckv, for Megatron: their settings, and their weights and gradients under
Megatron's names."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig

FOLDER = Path(__file__).parent / "lckv"
NAMES = ("llama", "cla", "lckv_w2", "sandwich_middle", "yoco", "lckv_m3_b1", "sliding_cyclic")
ACYCLIC = ("llama", "cla", "yoco")


@dataclass(frozen=True)
class Golden:
    """One recorded model."""

    header: dict[str, Any]
    tensors: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    @classmethod
    def load(cls, name: str) -> "Golden":
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            header = json.loads(file.metadata()["golden"])
        return cls(
            header, load_file(FOLDER / f"{name}.safetensors"), load_file(FOLDER / f"{name}.grads.safetensors")
        )

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            num_layers=self.header["num_hidden_layers"],
            hidden_size=self.header["hidden_size"],
            ffn_hidden_size=self.header["intermediate_size"],
            num_attention_heads=self.header["num_attention_heads"],
            num_query_groups=self.header["num_key_value_heads"],
            vocab_size=self.header["vocab_size"],
            make_vocab_size_divisible_by=1,
            layernorm_epsilon=self.header["rms_norm_eps"],
            rotary_base=self.header["rope_theta"],
        )

    @property
    def compression(self) -> CompressionConfig:
        return CompressionConfig(
            layer_types=self.header["layer_types"],
            forward_passes=self.header["forward_passes"],
            backward_passes=self.header["backward_passes"],
            sliding_window=self.header["sliding_window"],
            force_nodiag=self.header["force_nodiag"],
        )

    @property
    def tolerance(self) -> dict[str, float]:
        return self.header["tolerance"]

    def weights(self) -> dict[str, Tensor]:
        return self._megatron(lambda name: self.tensors[name])

    def gradient(self) -> dict[str, Tensor]:
        return self._megatron(lambda name: self.gradients[f"grad.{name}"])

    def _megatron(self, of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Whole parameters under Megatron's names, layers counted from the bottom of the model."""
        model = self.model
        whole = {
            "embedding.word_embeddings.weight": of("model.embed_tokens.weight"),
            "output_layer.weight": of("lm_head.weight"),
            "decoder.final_layernorm.weight": of("model.norm.weight"),
        }
        for index in range(model.num_layers):
            mine, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
            attention = f"{theirs}self_attn."
            query = of(f"{attention}q_proj.weight")
            if index in self.compression.map(model.num_layers).kv_layers:
                groups = [
                    weight.view(model.query_groups, -1, model.hidden_size)
                    for weight in (query, of(f"{attention}k_proj.weight"), of(f"{attention}v_proj.weight"))
                ]
                whole[f"{mine}self_attention.linear_qkv.weight"] = torch.cat(groups, 1).flatten(0, 1)
            else:
                whole[f"{mine}self_attention.linear_q.weight"] = query
            if self.compression.map(model.num_layers)[index].mixes is not None:
                for mix in ("key_weight", "value_weight"):
                    whole[f"{mine}self_attention.{mix}"] = of(f"{attention}{mix}")
            whole[f"{mine}self_attention.linear_proj.weight"] = of(f"{attention}o_proj.weight")
            whole[f"{mine}input_layernorm.weight"] = of(f"{theirs}input_layernorm.weight")
            whole[f"{mine}pre_mlp_layernorm.weight"] = of(f"{theirs}post_attention_layernorm.weight")
            gate, up = of(f"{theirs}mlp.gate_proj.weight"), of(f"{theirs}mlp.up_proj.weight")
            whole[f"{mine}mlp.linear_fc1.weight"] = torch.cat((gate, up))
            whole[f"{mine}mlp.linear_fc2.weight"] = of(f"{theirs}mlp.down_proj.weight")
        return whole

"""Models of transformers' own classes, of a few thousand random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 12},
}
"""What each family can do that not all can."""


def tiny_model(family: str, **settings: Any) -> PreTrainedModel:
    """A model with `SIZES`, `EXTRAS` and `settings`, all of whose weights, norms and biases too, are
    random."""
    configuration, architecture = CLASSES[family]
    torch.manual_seed(1)
    model = architecture(configuration(**(SIZES | EXTRAS[family] | settings))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def saved_model(folder: Path, family: str, **settings: Any) -> PreTrainedModel:
    """`tiny_model`, saved in `folder` by transformers."""
    model = tiny_model(family, **settings)
    model.save_pretrained(folder)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of two fixed sequences, longer than every window."""
    tokens = torch.arange(2 * 17).reshape(2, 17) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(tokens).logits

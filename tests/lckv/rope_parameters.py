"""Scalings of the rotary embedding as configs of transformers have them."""

from typing import Any

QWEN_128K = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""Of Qwen2.5 and Qwen3 with 131,072 tokens: heads of 128 channels, base 1e6."""
DEEPSEEK = {
    "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0,
}  # fmt: skip
"""As DeepSeek-V2-Lite, but for mscale_all_dim, which is 0.707 there, so that nothing is sharpened."""


def longrope(head_dim: int, original: int, **more: Any) -> dict[str, Any]:
    pairs = range(head_dim // 2)
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "short_factor": [1 + 0.05 * pair for pair in pairs],
        "long_factor": [1 + 0.7 * pair for pair in pairs],
        **more,
    }

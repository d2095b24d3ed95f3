from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lckv.families.rope import read_rope, rope_problems
from lckv.rope import RotaryEmbedding, inverse_frequencies, rotate, rotation
from tests.lckv.rope_parameters import DEEPSEEK, QWEN_128K, longrope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


CASES: dict[str, tuple[dict[str, Any], int, int, float, tuple[int, ...]]] = {
    # rope_parameters, head_dim, max_position_embeddings, base, lengths of texts
    "default": ({"rope_type": "default"}, 32, 512, 5e5, (200,)),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 32, 512, 5e5, (200,)),
    "llama3": (LLAMA3, 32, 512, 5e5, (200,)),
    "Qwen 128k": (QWEN_128K, 128, 131072, 1e6, (200,)),
    "DeepSeek": (DEEPSEEK, 64, 163840, 1e4, (200,)),
    "mscale alone": ({**QWEN_128K, "mscale": 0.7}, 128, 131072, 1e6, (200,)),
    "attention factor": ({**QWEN_128K, "attention_factor": 1.25}, 128, 131072, 1e6, (200,)),
    "not truncated": ({**QWEN_128K, "truncate": False, "beta_slow": 3}, 128, 131072, 1e6, (200,)),
    "nothing between": (
        {**QWEN_128K, "original_max_position_embeddings": 6, "beta_fast": 1},
        16,
        64,
        1e4,
        (20,),
    ),
    "longrope": (longrope(96, 128), 96, 4096, 1e4, (100, 128, 129, 200)),
    "longrope with a factor": (longrope(96, 128, factor=7.0), 96, 4096, 1e4, (100, 129)),
    "longrope, not longer": (longrope(96, 128), 96, 128, 1e4, (100,)),
    "longrope, attention factor": (longrope(96, 128, attention_factor=1.4), 96, 512, 1e4, (129,)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.5}, 64, 64, 1e4, (10, 64, 65, 200)),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_rotation_are_those_of_transformers(name: str) -> None:
    parameters, head_dim, context, base, lengths = CASES[name]
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": base, **parameters},
    )
    given = {"rope_parameters": {"rope_theta": base, **parameters}}
    assert list(rope_problems(given)) == []
    rope = RotaryEmbedding(head_dim, *read_rope(given, context), context)
    for length in lengths:
        theirs = LlamaRotaryEmbedding(config)  # a new one: it remembers the longest text
        query, positions = torch.randn(1, 2, length, head_dim), torch.arange(length)[None]
        cos, sin = theirs(query, positions)
        assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
        expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
        for known in (length, torch.tensor(length)):
            torch.testing.assert_close(rope.frequencies(known), theirs.inv_freq.float(), rtol=1e-6, atol=0)
        for angles in (rope.rotation(positions[:, None], length), rope.rotation(positions[:, None])):
            torch.testing.assert_close(rotate(query, angles), expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_does_not_reach_the_angles() -> None:
    frequencies = inverse_frequencies(64, 1e4)
    x = torch.randn(4096, 64)
    positions = torch.arange(4096)
    exact = rotate(x, rotation(positions, frequencies))
    rounded = rotate(x.bfloat16(), rotation(positions, frequencies)).float()
    assert (exact - rounded).abs().max() < 0.1

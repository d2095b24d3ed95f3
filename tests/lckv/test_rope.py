import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lckv.rope import LinearScaling, Llama3Scaling, inverse_frequencies, rotate, rotation

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 64)),
    ],
    ids=["default", "linear", "llama3"],
)
def test_frequencies_and_rotation_are_those_of_transformers(parameters: dict, scaling: object) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 5e5, **parameters},
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(32, 5e5, scaling)
    torch.testing.assert_close(frequencies, theirs.inv_freq.float(), rtol=1e-6, atol=0)
    query = torch.randn(1, 2, 200, 32)
    positions = torch.arange(200)[None]
    cos, sin = theirs(query, positions)
    expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
    torch.testing.assert_close(
        rotate(query, rotation(positions[:, None], frequencies)), expected, rtol=1e-5, atol=2e-5
    )


def test_bfloat16_does_not_reach_the_angles() -> None:
    frequencies = inverse_frequencies(64, 1e4)
    x = torch.randn(4096, 64)
    positions = torch.arange(4096)
    exact = rotate(x, rotation(positions, frequencies))
    rounded = rotate(x.bfloat16(), rotation(positions, frequencies)).float()
    assert (exact - rounded).abs().max() < 0.1

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lckv.families.rope import read_rope, rope_problems
from lckv.rope import (
    RotaryEmbedding,
    Rotation,
    SmallTurn,
    Turn,
    inverse_frequencies,
    rotate,
    rotate_by_formula,
    rotation,
)
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


@pytest.mark.parametrize("with_last", [False, True])
def test_turning_and_its_gradient_are_those_of_the_formula(with_last: bool) -> None:
    """Of heads that are a part of what a projection makes, as they come."""
    angles = rotation(torch.arange(7)[:, None, None] * 5, inverse_frequencies(16, 100.0), 1.3)
    angles = Rotation(*(tensor.double() for tensor in angles))
    projected = torch.randn(7, 2, 3, 40, dtype=torch.float64, requires_grad=True)
    last = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True) if with_last else None
    weight = torch.randn(2, 3, 7, 16, dtype=torch.float64).permute(2, 0, 1, 3)
    inputs = [projected] if last is None else [projected, last]
    results = []
    for turn in (rotate, rotate_by_formula):
        turned = turn(projected[..., 5:21], angles, last=last)
        results.append((turned, *torch.autograd.grad((turned * weight).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        assert torch.equal(rotate(projected[..., 5:21], angles, last=last), results[0][0])
    assert rotate(projected[..., 5:21], angles, last=2.0)[..., -1].eq(2.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_takes_few_kernels_and_keeps_no_heads(dtype: torch.dtype) -> None:
    """Four over half of the channels, and as many in backward; nothing of the heads' size is kept."""
    angles = rotation(torch.arange(64)[:, None, None], inverse_frequencies(16, 100.0))
    heads = torch.randn(64, 2, 3, 16, dtype=dtype, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with Kernels() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        turned = rotate(heads, angles)
    gradient = torch.ones_like(turned)
    with Kernels() as backward:
        turned.backward(gradient)
    casts = 0 if dtype == torch.float32 else 2  # of the angles
    for seen in (forward, backward):
        assert seen.names == ["_to_copy"] * casts + ["mul", "addcmul_"] * 2
    assert all(tensor.numel() < heads.numel() for tensor in kept)


class Kernels(TorchDispatchMode):
    """Operators that make or change tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("new_empty", "detach")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [None, 3.5, "tensor"])
def test_a_small_turn_is_the_same_turn(dtype: torch.dtype, last: float | str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    # A part of a projection that all heads share.
    heads = torch.randn(1, 3, 5, 16, generator=generator).to(dtype)[..., :8]
    angles = rotation(torch.tensor([[0, 17, 12345]]), inverse_frequencies(8, 1e4, None))
    newest = torch.randn(1, 3, 5, generator=generator) if last == "tensor" else last
    large = Turn(Rotation(*(part[:, :, None] for part in angles)))
    assert torch.equal(SmallTurn.of(angles, dtype)(heads, last=newest), large(heads, last=newest))

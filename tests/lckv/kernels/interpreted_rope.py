"""The Triton kernel against the formula in float64, on CPU through Triton's interpreter.

Not collected by name: Triton decides when it is imported whether it interprets, so `test_rope.py` runs this
file in a process of its own, with TRITON_INTERPRET=1.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.kernels import rope
from lckv.rope import Rotation, Turn, inverse_frequencies, rotate, rotate_by_formula, rotation

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
"""The interpreter cuts off where a GPU rounds to bfloat16."""


def angles_of(rows: int, channels: int) -> Rotation:
    positions = torch.arange(5)[:, None, None] * 7 + torch.arange(rows)[:, None]
    return rotation(positions, inverse_frequencies(channels, 100.0), 1.3)


@pytest.mark.parametrize("last", ["none", "number", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "heads", "channels", "rows_of_angles"),
    [
        (torch.float32, 3, 16, 2),
        (torch.float32, 1, 6, 1),
        (torch.bfloat16, 40, 128, 2),  # two programs for a token
        (torch.float16, 2, 80, 2),
    ],
)
def test_turning_and_its_gradient_are_those_of_the_formula(
    dtype: torch.dtype, heads: int, channels: int, rows_of_angles: int, last: str
) -> None:
    """Heads are a part of what a projection makes; their gradient comes as attention returns it."""
    torch.manual_seed(heads)
    angles = angles_of(rows_of_angles, channels)
    projected = torch.randn(5, 2, heads, 2 * channels).to(dtype).requires_grad_()
    newest = torch.randn(5, heads, 2).to(dtype).requires_grad_() if last == "tensor" else None
    gradient = torch.randn(2, heads, 5, channels).to(dtype)
    results = []
    for turn, number in ((rotate, dtype), (rotate_by_formula, torch.float64)):
        options: dict[str, Any] = {"kernel": rope.turned} if turn is rotate else {}
        leaves = [
            tensor.detach().to(number).requires_grad_()
            for tensor in (projected, newest)
            if tensor is not None
        ]
        given = leaves[1].transpose(1, 2) if last == "tensor" else {"none": None, "number": 2.5}[last]
        of = angles if turn is rotate else Rotation(*(tensor.double() for tensor in angles))
        turned = turn(leaves[0][..., 3 : 3 + channels], of, last=given, **options)
        outward = gradient.to(number).permute(2, 0, 1, 3)
        results.append((turned, *torch.autograd.grad(turned, leaves, outward)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_it_is_one_launch_forward_and_one_backward_and_keeps_no_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches, kept = [], []
    original = rope._turn

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return original[grid]

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(rope, "_turn", Counting())
    turn = Turn(angles_of(2, 16), rope.turned).at(lambda tensor: tensor[1:])
    heads = torch.randn(4, 2, 3, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        turned = turn(heads)
    turned.sum().backward()
    assert launches == [(8, 1), (8, 1)]
    assert turned.is_contiguous()
    assert all(tensor.numel() < heads.numel() for tensor in kept)

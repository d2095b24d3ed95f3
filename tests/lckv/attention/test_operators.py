"""PyTorch's operators that are called by their names, which a change of PyTorch may change: on the meta
device, where their schemas and shape functions check every argument, and on the CPU."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lckv
import megatron_ext
from lckv.attention.aten_pairs import AtenCPU, AtenEfficient, AtenFlash
from lckv.attention.flash_pair import FlashPair, Problem
from lckv.attention.sequences import Sequences, layout_of
from lckv.attention.visibility import Documents

PAIRS: dict[str, tuple[FlashPair, str, tuple[torch.dtype, ...]]] = {
    "cpu": (AtenCPU(), "cpu", (torch.float32, torch.bfloat16)),
    "flash": (AtenFlash(), "meta", (torch.bfloat16, torch.float16)),
    "efficient": (AtenEfficient(), "meta", (torch.float32,)),
}
NAMESPACES = ("torch.ops.aten", "_ATEN")


class Seen(TorchDispatchMode):
    """Notes the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def attend(
    pair: FlashPair,
    device: str,
    dtype: torch.dtype,
    heads: int,
    length: int,
    channels: int,
    keys: int | None = None,
    sequences: Sequences | None = None,
) -> None:
    """Forward and backward, as in a model: rows lie [s, b, heads, d]. Without `keys` it is causal."""

    def draw(count: int, tokens: int) -> Tensor:
        return torch.zeros(tokens, 2, count, channels, dtype=dtype, device=device).permute(1, 2, 0, 3)

    causal, keys = keys is None, keys or length
    query, key, value = draw(heads, length), draw(2, keys), draw(2, keys)
    problem = Problem(query, key, value, 0.25, causal, sequences)
    attended = pair.forward(problem)
    assert (attended.output.shape, attended.output.dtype) == (query.shape, dtype)
    assert (attended.lse.shape, attended.lse.dtype) == (query.shape[:-1], torch.float32)
    gradients = pair.backward(attended.output, problem, attended)
    for gradient, of in zip(gradients, (query, key, value), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (of.shape, dtype, of.device)


@pytest.mark.parametrize(
    ("heads", "length", "channels"), [(2, 1, 8), (4, 33, 64), (16, 128, 128), (6, 45, 256)]
)
@pytest.mark.parametrize("keys", [None, 7, 300], ids=["causal", "fewer keys", "more keys"])
@pytest.mark.parametrize("name", PAIRS)
def test_arguments_bind_and_shapes_are_as_expected(
    name: str, keys: int | None, heads: int, length: int, channels: int
) -> None:
    pair, device, dtypes = PAIRS[name]
    for dtype in dtypes:
        attend(pair, device, dtype, heads, length, channels, keys)


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_arguments_bind_with_sequences(name: str, behind: int) -> None:
    pair, device, dtypes = PAIRS[name]
    documents = Documents.at((0, 5, 33, 40, 66), device)
    layout = layout_of(documents, 2, 33, 33, behind)
    assert layout.sequences is not None
    for dtype in dtypes:
        attend(pair, device, dtype, 4, 33 - behind, 64, sequences=layout.sequences)


def test_every_operator_that_is_called_by_name_is_among_these() -> None:
    with Seen() as seen:
        for pair, device, dtypes in PAIRS.values():
            attend(pair, device, dtypes[0], 4, 33, 64)
            sequences = layout_of(Documents.at((0, 5, 66), device), 1, 66, 66, 0).sequences
            attend(pair, device, dtypes[0], 4, 33, 64, sequences=sequences)
    named = operators_called_by_name()
    assert len(named) >= 6
    asked_for = {"mm"}  # by lckv/losses: whether it takes out_dtype
    assert named - asked_for <= seen.names


def operators_called_by_name() -> set[str]:
    names = set()
    for package in (lckv, megatron_ext):
        for path in Path(package.__path__[0]).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "torch.ops" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in NAMESPACES:
                    names.add(node.attr)
    return names

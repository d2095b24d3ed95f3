"""Triton launches kernels on the current device, whatever device their tensors are on."""

import ast
from pathlib import Path

import pytest

import lckv

FILES = [
    path
    for path in sorted(Path(lckv.__file__).parent.rglob("*.py"))
    if "import triton" in path.read_text(encoding="utf-8")
]


def test_there_are_kernels() -> None:
    assert len(FILES) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-4:]))
def test_kernels_are_launched_on_the_device_of_their_tensors(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kernels = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.") for decorator in node.decorator_list)
    }
    launches = set(_launches(tree, kernels))
    guarded = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(ast.unparse(item.context_expr).startswith("torch.cuda.device_of(") for item in node.items)
        for line in _launches(node, kernels)
    }
    assert launches
    assert launches == guarded


def _launches(tree: ast.AST, kernels: set[str]) -> list[int]:
    """Lines of kernel[grid](...)."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in kernels
    ]

"""The project compiles nothing with torch: that costs minutes at the start of a run and again for every new
shape, and changes numbers. Whoever wants it compiles an exported model. Read from the syntax trees."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_layering import ROOT, modules_of

_COMPILERS = ("compile", "_dynamo", "_inductor")


def compiled(tree: ast.AST) -> Iterator[int]:
    """Lines that compile with torch."""
    return (node.lineno for node in ast.walk(tree) if _compiles(node))


def _compiles(node: ast.AST) -> bool:
    """`torch.compile`, by whichever name, or a module's method `compile`, which, unlike those of other
    objects, takes no positional arguments."""
    match node:
        case ast.ImportFrom(module=str(module), names=names):
            return module.partition(".")[0] == "torch" and any(name.name in _COMPILERS for name in names)
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name in _COMPILERS
        case ast.Call(func=ast.Attribute(attr="compile"), args=[]):
            return True
    return False


def test_nothing_is_compiled_by_torch() -> None:
    modules = modules_of(ROOT)
    assert len(modules) > 300
    lines = [
        f"{name}:{line}"
        for name, path in modules.items()
        for line in compiled(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert lines == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.compile(model)",
        "@torch.compile\ndef f(): ...",
        "from torch import compile as fast",
        "model.compile(mode='max-autotune')",
        "run = torch.compile",
        "torch._dynamo.optimize()(model)",
    ],
)
def test_compiling_is_seen(code: str) -> None:
    assert list(compiled(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["re.compile('x')", "torch.compiler.is_compiling()", "grammars.compile(text)"]
)
def test_other_compilers_are_let_through(code: str) -> None:
    assert not list(compiled(ast.parse(code)))

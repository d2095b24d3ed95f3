"""A name says what it holds: no result is called `found`, no member of a group `each`.

The names are read from the syntax trees of the product code. The check is a function from a source tree to
sentences, one for each such name. It is tried on small bad trees.
"""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lckv", "megatron_ext", "checkpoints_conversion", "lckv_megatron", "tools")
PROGRAM = "pretrain_lckv.py"
EMPTY_NAMES = {"found", "each"}


def sources_of(root: Path) -> list[Path]:
    """The product code below `root`: files of the packages, and the training program."""
    return sorted([*(path for name in PACKAGES for path in (root / name).rglob("*.py")), root / PROGRAM])


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that the code gives to something, with their lines: variables, targets of loops and
    comprehensions, parameters, attributes, functions, classes, caught errors, imports and captures of
    patterns."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                yield name, node.lineno
            case ast.MatchMapping(rest=str(name)):
                yield name, node.lineno


def empty_names(root: Path) -> list[str]:
    """One sentence for each name that does not say what it holds."""
    return [
        f"{path.relative_to(root)}:{line}: {name} does not say what it holds"
        for path in sources_of(root)
        for name, line in bound_names(ast.parse(path.read_text(encoding="utf-8")))
        if name in EMPTY_NAMES
    ]


def test_the_product_code_is_seen() -> None:
    packages = {path.relative_to(ROOT).parts[0] for path in sources_of(ROOT)}
    assert packages == {*PACKAGES, PROGRAM}


def test_names_say_what_they_hold() -> None:
    assert empty_names(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "found = 1",
        "found: int = 1",
        "found += 1",
        "first, *found = 1, 2",
        "if (found := 1): pass",
        "for number, each in enumerate([]): pass",
        "numbers = [each for each in []]",
        "def show(found): pass",
        "def show(*, each=1): pass",
        "show = lambda *each: 1",
        "self.found = 1",
        "with open(name) as found: pass",
        "try: pass\nexcept ValueError as found: pass",
        "def found(): pass",
        "async def each(): pass",
        "class found: pass",
        "import numbers as found",
        "match 1:\n    case found: pass",
        "match 1:\n    case [*each]: pass",
        "match 1:\n    case {**each}: pass",
    ],
)
@pytest.mark.parametrize("place", ["lckv/cache/pages.py", "tools/measure.py", PROGRAM])
def test_a_name_that_says_nothing_is_seen(tmp_path: Path, place: str, line: str) -> None:
    _write(tmp_path, place, f"class Outer:\n    def inner(self):\n{textwrap.indent(line, ' ' * 8)}\n")
    (sentence,) = empty_names(tmp_path)
    name = "found" if "found" in line else "each"
    assert sentence.startswith(f"{place}:") and sentence.endswith(f": {name} does not say what it holds")


def test_other_uses_of_the_words_are_no_names(tmp_path: Path) -> None:
    _write(tmp_path, "lckv/pages.py", "# found\nfound_pages = 'each'\nprint(found_pages, matcher.found)\n")
    assert empty_names(tmp_path) == []


def _write(root: Path, place: str, text: str) -> None:
    for file, content in {PROGRAM: "", place: text}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content, encoding="utf-8")

"""The pages of the project name what exists: files, modules, settings, programs, and headings of other pages.

A page is checked as it is read on GitHub. Code blocks are not checked: they show commands and output.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.config import RunConfig
from tests.test_project import MACHINE_TRACES

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]

PACKAGES = ("lckv", "megatron_ext", "checkpoints_conversion", "lckv_megatron", "tools", "tests")
FOLDERS = (*PACKAGES, "docs", "examples", ".ci")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".sh", ".cff")
"""Of a file name without a folder; other endings are those of a user's files as well."""
FORBIDDEN_NAMES = ("utils.py",)
"""Pages speak of them because there are none."""
PLACEHOLDER = re.compile(r"\b(?:NAME|RECIPE|FOLDER|FILE)\b|[*<]|\.\.\.")
LONGEST_LINE = 110

_BLOCK = re.compile(r"^```.*?^```", re.M | re.S)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def code_of(text: str) -> list[str]:
    """What stands in backticks, outside code blocks."""
    return _CODE.findall(_BLOCK.sub("", text))


def links_of(text: str) -> list[str]:
    """Targets of links and pictures, outside code."""
    return _LINK.findall(_CODE.sub("`", _BLOCK.sub("", text)))


def anchors_of(text: str) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def missing_names(code: str, root: Path) -> Iterator[str]:
    """Sentences on the files, modules and programs in a piece of code that are not below `root`."""
    if PLACEHOLDER.search(code):
        return
    words = code.split()
    if words[0] == "lckv-megatron" and len(words) > 1 and not words[1].startswith("-"):
        if not _has_program(words[1], root):
            yield f"lckv-megatron has no program {words[1]}"
        return
    for word in words:
        for path in _braces(word.rstrip(",;:")):
            if "/" in path and path.split("/")[0] in FOLDERS:
                if not (root / path).exists():
                    yield f"{path} is not there"
            elif "/" not in path and path.endswith(SUFFIXES) and not _may_be_named(path, root):
                yield f"no file is called {path}"
            elif re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", path) and not _is_module(path, root):
                yield f"{path} is neither a module nor defined in one"


def _braces(word: str) -> list[str]:
    """a/{b,c}/ as a/b/ and a/c/."""
    match = re.fullmatch(r"(.*)\{([\w,.]+)\}(.*)", word)
    return [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")] if match else [word]


def _may_be_named(name: str, root: Path) -> bool:
    """Whether a file of the project has this name, in whatever folder."""
    return (
        (root / name).is_file()
        or name in FORBIDDEN_NAMES
        or any(path.is_file() for folder in FOLDERS for path in (root / folder).rglob(name))
    )


def _has_program(name: str, root: Path) -> bool:
    return (root / "lckv_megatron" / "commands" / f"{name.replace('-', '_')}.py").is_file()


def _is_module(dotted: str, root: Path) -> bool:
    """Whether a dotted name is a package, a module, or something at the top of one. Nothing is imported."""
    path = root
    for index, part in enumerate(parts := dotted.split(".")):
        path /= part
        if path.is_dir():
            continue
        if not (module := path.with_suffix(".py")).is_file():
            module = path.parent / "__init__.py"
            return module.is_file() and part in _defined(module)
        return len(parts) == index + 1 or parts[index + 1] in _defined(module)
    return True


@functools.cache
def _defined(module: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return frozenset(names)


def missing_settings(code: str) -> Iterator[str]:
    """Sentences on the settings in a piece of code that a run does not have; not those of KV policies."""
    sections = {section.name: section.default_factory for section in dataclasses.fields(RunConfig)}
    for word in re.findall(r"(?<![\w./-])(?:--)?(\w+\.\w+)(?![\w/(])", code):
        section, field = word.split(".")
        if section in sections and f".{field}" not in (*SUFFIXES, ".yaml", ".json", ".safetensors", ".png"):
            known = {entry.name for entry in dataclasses.fields(sections[section])}  # type: ignore[arg-type]
            if field not in known:
                yield f"there is no setting {word}"


def broken_links(page: Path) -> Iterator[str]:
    """Sentences on the internal links of a page that lead nowhere."""
    for target in links_of(page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and anchor not in anchors_of(other.read_text(encoding="utf-8")):
            yield f"the link {target} leads to no heading"


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in links_of(index.read_text(encoding="utf-8"))}
    assert {*DOCS} - {index} <= linked


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_what_a_page_names_exists(page: Path) -> None:
    pieces = code_of(page.read_text(encoding="utf-8"))
    assert sorted({sentence for code in pieces for sentence in missing_names(code, ROOT)}) == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    pieces = code_of(page.read_text(encoding="utf-8"))
    assert sorted({sentence for code in pieces for sentence in missing_settings(code)}) == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_lines_of_a_page_are_short_and_name_no_machine(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        assert len(line) <= LONGEST_LINE, line
        assert not any(pattern.search(line) for pattern in MACHINE_TRACES.values()), line


# The checks themselves, on small trees that are wrong.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "lckv" / "cache").mkdir(parents=True)
    (tmp_path / "lckv" / "__init__.py").write_text("")
    (tmp_path / "lckv" / "cost.py").write_text("from math import pi\nLIMIT = 3\n\ndef price(): ...\n")
    (tmp_path / "lckv_megatron" / "commands").mkdir(parents=True)
    (tmp_path / "lckv_megatron" / "commands" / "kv_memory.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "code",
    [
        "lckv/cost.py", "cost.py", "lckv/{cache,cost.py}", "lckv.cost", "lckv.cost.price", "lckv.cost.LIMIT",
        "lckv.cost.pi", "python -m lckv.cost --help", "lckv/policies/NAME/", "runs/demo", "0_0",
        "utils.py", "config.json", "lckv-megatron kv-memory --model out/model", "lckv-megatron NAME",
    ],
)  # fmt: skip
def test_names_that_are_right_pass(code: str, tree: Path) -> None:
    assert list(missing_names(code, tree)) == []


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("lckv/price.py", "lckv/price.py is not there"),
        ("python lckv/price.py --help", "lckv/price.py is not there"),
        ("price.py", "no file is called price.py"),
        ("lckv/{cache,plan}/", "lckv/plan/ is not there"),
        ("lckv.cost.bytes", "lckv.cost.bytes is neither a module nor defined in one"),
        ("lckv.plan", "lckv.plan is neither a module nor defined in one"),
        ("lckv-megatron cook", "lckv-megatron has no program cook"),
    ],
)
def test_names_that_are_wrong_are_seen(code: str, sentence: str, tree: Path) -> None:
    assert list(missing_names(code, tree)) == [sentence]


def test_settings_are_looked_up() -> None:
    assert list(missing_settings("--train.train_iters 5, model.yaml, compression.policy.stage")) == []
    assert list(missing_settings("--train.iterations 5")) == ["there is no setting train.iterations"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Two words, `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md#two-words-code) [b](#top) [c](gone.md) [d](other.md#gone) [e](https://x.org)\n"
        "```\n[f](gone.md)\n```\n"
    )
    assert list(broken_links(page)) == [
        "the link gone.md leads nowhere",
        "the link other.md#gone leads to no heading",
    ]

"""The order of the packages (CONTRIBUTING.md, "Layers"), read from the syntax trees.

Each check is a function from the imports of a source tree to sentences, one for each import that breaks the
rule; the checks themselves are tried on small bad trees.
"""

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    "lckv": 0,
    "megatron_ext": 1,
    "checkpoints_conversion": 2,
    "lckv_megatron": 3,
    "tools": 4,
    "pretrain_lckv": 4,
}
"""A module imports from its own package and from packages with a smaller number."""
NEVER_IMPORTED = ("tools", "examples", "tests", "pretrain_lckv")
OPTIONAL_PACKAGES = (
    "transformer_engine", "flash_attn", "triton", "liger_kernel", "cut_cross_entropy", "apex", "wandb",
    "lm_eval", "fastapi", "uvicorn", "prometheus_client", "openai", "gguf", "pyarrow",
    "llguidance",
)  # fmt: skip
OPTIONAL_FOLDERS = {"kernels", "serving"}
"""Modules in folders of these names may import optional packages at their top; others import them when
needed."""
TRANSFORMERS_IN_LCKV = ("lckv.models", "lckv.generation", "lckv.families.harmless")


@dataclass(frozen=True)
class Import:
    """One import: `source` and `target` are dotted names of modules; a name imported from a module is no part
    of it."""

    source: str
    target: str
    line: int
    at_top: bool
    """Runs when `source` is imported: not inside a function, not under TYPE_CHECKING."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def modules_of(root: Path) -> dict[str, Path]:
    """The project's modules below `root`, by dotted name."""
    paths = itertools.chain(*((root / name).rglob("*.py") for name in LAYERS), root.glob("pretrain_lckv.py"))
    modules = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@cache
def imports_of(root: Path) -> list[Import]:
    """Every import of every module below `root`, those inside functions too."""
    modules = modules_of(root)
    found = []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, at_top in _import_statements(ast.parse(path.read_text(encoding="utf-8")), True):
            found += [
                Import(name, target, node.lineno, at_top) for target in _targets(node, package, modules)
            ]
    return found


def _import_statements(node: ast.AST, at_top: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, at_top
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _import_statements(child, False)
        for child in node.orelse:
            yield from _import_statements(child, at_top)
    else:
        inside = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # no expression imports
                yield from _import_statements(child, inside)


def _targets(node: ast.Import | ast.ImportFrom, package: str, modules: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _top(module: str) -> str:
    return module.partition(".")[0]


def against_the_layers(imports: list[Import]) -> list[str]:
    """Imports of a package that stands higher, or beside; lckv's imports of Megatron."""
    found = []
    for each in imports:
        source, target = _top(each.source), _top(each.target)
        if source == target:
            continue
        if target in NEVER_IMPORTED:
            found.append(f"{each}: nothing imports {target}")
        elif target in LAYERS and LAYERS[target] >= LAYERS[source]:
            found.append(f"{each}: {source} stands below {target}")
        elif source == "lckv" and target == "megatron":
            found.append(f"{each}: lckv knows nothing of Megatron")
    return found


def transformers_outside_models(imports: list[Import]) -> list[str]:
    """Imports of transformers in lckv other than in its models and generation."""
    return [
        f"{each}: in lckv only {' and '.join(TRANSFORMERS_IN_LCKV)} may"
        for each in imports
        if _within(each.source, "lckv")
        and _within(each.target, "transformers")
        and not any(_within(each.source, allowed) for allowed in TRANSFORMERS_IN_LCKV)
    ]


def mutual_subpackages(imports: list[Import], packages: set[str]) -> list[str]:
    """Pairs of subpackages of one package that import each other, anywhere in their code."""
    edges: dict[tuple[str, str], Import] = {}
    for each in imports:
        source, target = each.source.split("."), each.target.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(source, target, strict=False)) if a != b), 0)
        pair = ".".join(source[: shared + 1]), ".".join(target[: shared + 1])
        if shared and packages.issuperset(pair):
            edges.setdefault(pair, each)
    return [
        f"{a} and {b} import each other: {edges[a, b]}; {edges[b, a]}"
        for a, b in edges
        if a < b and (b, a) in edges
    ]


def cycles(imports: list[Import]) -> list[str]:
    """Groups of project modules each of which needs the others to be imported."""
    needs: dict[str, set[str]] = {}
    for each in imports:
        if each.at_top and each.source != each.target:
            needs.setdefault(each.source, set()).add(each.target)
    # What cannot be imported before itself: leave out, again and again, every module that needs none of those
    # left.
    left = set(needs)
    while removable := {module for module in left if not needs[module] & left}:
        left -= removable
    # What remains needs a cycle; of these, only those on a cycle are needed by one that remains.
    while removable := left - set().union(*(needs[module] for module in left)):
        left -= removable
    return [f"modules that import each other in a circle: {', '.join(sorted(left))}"] if left else []


def optional_at_top(imports: list[Import]) -> list[str]:
    """Imports at module level, outside the folders for them, of optional packages or of a module of such a
    folder."""
    found = []
    for each in imports:
        if not each.at_top or OPTIONAL_FOLDERS.intersection(each.source.split(".")):
            continue
        if _top(each.target) in OPTIONAL_PACKAGES:
            found.append(f"{each} at its top: {_top(each.target)} is optional, import it where it is needed")
        elif _top(each.target) in LAYERS and OPTIONAL_FOLDERS.intersection(each.target.split(".")):
            found.append(f"{each} at its top: it needs optional packages, import it where it is needed")
    return found


def _packages(root: Path) -> set[str]:
    return {name for name, path in modules_of(root).items() if path.name == "__init__.py"}


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "layers": lambda root: against_the_layers(imports_of(root)),
    "transformers": lambda root: transformers_outside_models(imports_of(root)),
    "mutual": lambda root: mutual_subpackages(imports_of(root), _packages(root)),
    "cycles": lambda root: cycles(imports_of(root)),
    "optional": lambda root: optional_at_top(imports_of(root)),
}


@pytest.mark.parametrize("check", CHECKS)
def test_project_keeps_the_rule(check: str) -> None:
    assert len(imports_of(ROOT)) > 50, "the walk over the source files found next to nothing"
    assert CHECKS[check](ROOT) == []


def test_lckv_names_no_setting_of_a_run() -> None:
    """Callers add the names. The section `compression` is a field of Hugging Face configs too."""
    from megatron_ext.config import RunConfig
    from megatron_ext.settings import settings_of

    keys = [key for key in settings_of(RunConfig) if not key.startswith("compression.")]
    assert len(keys) > 50
    named = re.compile("|".join(rf"\b{re.escape(key)}\b" for key in keys))
    lines = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {match[0]}"
        for path in sorted((ROOT / "lckv").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in named.finditer(node.value)
    ]
    assert lines == []


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in [*modules_of(ROOT).values(), *(ROOT / "tests").rglob("*.py")]} - {ROOT}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


BAD_TREES: list[tuple[str, dict[str, str], str]] = [
    (
        "layers",
        {"lckv/a.py": "import megatron_ext.b", "megatron_ext/b.py": ""},
        "lckv stands below megatron_ext",
    ),
    ("layers", {"lckv/a.py": "def f():\n    from megatron.core import x"}, "knows nothing of Megatron"),
    ("layers", {"megatron_ext/a.py": "from checkpoints_conversion import x"}, "megatron_ext stands below"),
    ("layers", {"megatron_ext/a.py": "from tools import plan"}, "nothing imports tools"),
    (
        "layers",
        {"checkpoints_conversion/a.py": "import lckv_megatron.b", "lckv_megatron/b.py": ""},
        "checkpoints_conversion stands below lckv_megatron",
    ),
    ("layers", {"tools/a.py": "import pretrain_lckv"}, "nothing imports pretrain_lckv"),
    ("layers", {"pretrain_lckv.py": "from tools.plan import x"}, "nothing imports tools"),
    ("layers", {"lckv/a.py": "from tests.ranks import x"}, "nothing imports tests"),
    (
        "transformers",
        {"lckv/cache/a.py": "import transformers.cache_utils"},
        "lckv.models and lckv.generation",
    ),
    (
        "mutual",
        {"lckv/a/x.py": "from ..b import y", "lckv/b/y.py": "def f():\n    import lckv.a.x"},
        "lckv.a and lckv.b import each other",
    ),
    (
        "mutual",
        {"lckv/p/a/x.py": "from lckv.p.b import y", "lckv/p/b/y.py": "from lckv.p import a"},
        "lckv.p.a and lckv.p.b import each other",
    ),
    ("cycles", {"lckv/a.py": "from lckv import b", "lckv/b.py": "from .a import x"}, "lckv.a, lckv.b"),
    (
        "cycles",
        {
            "lckv/a.py": "import lckv.b",
            "lckv/b.py": "from lckv.c import x",
            "lckv/c.py": "try:\n    from . import a\nexcept ImportError:\n    a = None",
            "lckv/before.py": "import lckv.a",
        },
        "circle: lckv.a, lckv.b, lckv.c",
    ),
    ("optional", {"lckv/a.py": "import flash_attn"}, "flash_attn is optional"),
    (
        "optional",
        {"lckv/a.py": "try:\n    from triton import jit\nexcept ImportError:\n    jit = None"},
        "triton",
    ),
    ("optional", {"lckv/a.py": "class A:\n    import wandb"}, "wandb"),
    (
        "optional",
        {"lckv/a.py": "from lckv.x.kernels import k", "lckv/x/kernels/k.py": "import triton"},
        "lckv.a:1",
    ),
]

GOOD_TREE = {
    "lckv/a/x.py": "import torch\nfrom lckv.b import y",
    "lckv/b/y.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lckv.b import z\n    import triton"
    ),
    "lckv/b/z.py": (
        "from lckv.b.y import f\ndef g():\n    import flash_attn\n    from lckv.x.kernels import k"
    ),
    "lckv/models/m.py": "from transformers import PreTrainedModel",
    "lckv/x/kernels/k.py": "import triton",
    "megatron_ext/c.py": "import megatron.core\nimport transformers\nfrom lckv.a import x",
    "checkpoints_conversion/d.py": "from megatron_ext import c",
    "lckv_megatron/commands/p.py": "from checkpoints_conversion import d\nfrom lckv_megatron import q",
    "lckv_megatron/q.py": "from lckv.a import x",
    "tools/benchmarks/e.py": "from tools.benchmarks import f\nfrom lckv_megatron import q",
    "tools/benchmarks/f.py": "",
    "pretrain_lckv.py": "from megatron_ext import c",
}


def _write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for folder in path.relative_to(root).parents:
            if folder.name:
                (root / folder / "__init__.py").touch()


@pytest.mark.parametrize(("check", "files", "sentence"), BAD_TREES)
def test_check_finds_what_is_wrong(tmp_path: Path, check: str, files: dict[str, str], sentence: str) -> None:
    _write_tree(tmp_path, files)
    found = CHECKS[check](tmp_path)
    assert len(found) == 1
    assert sentence in found[0]


@pytest.mark.parametrize("check", CHECKS)
def test_check_accepts_what_is_right(tmp_path: Path, check: str) -> None:
    _write_tree(tmp_path, GOOD_TREE)
    assert CHECKS[check](tmp_path) == []


IMPORT_EVERYTHING = """
import importlib, json, os, sys, threading
import torch, torch.distributed, torch.cuda.nvtx
import megatron.core.tensor_parallel.random as tensor_parallel_random
from megatron.core import parallel_state

modules_before = set(sys.modules)
places = {"torch": torch, "torch.cuda": torch.cuda, "nvtx": torch.cuda.nvtx, "Tensor": torch.Tensor,
          "random": tensor_parallel_random, "parallel_state": parallel_state}
functions = {(place, name): value for place, owner in places.items() for name, value in vars(owner).items()
             if callable(value)}
threads, arguments, generator = threading.active_count(), list(sys.argv), torch.get_rng_state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps({
    "patched": sorted(f"{place}.{name}" for (place, name), value in functions.items()
                      if vars(places[place]).get(name) is not value),
    "cuda initialised": torch.cuda.is_initialized(),
    "torch.distributed initialised": torch.distributed.is_initialized(),
    "threads started": threading.active_count() - threads,
    "arguments changed": sys.argv != arguments,
    "random state changed": not torch.equal(generator, torch.get_rng_state()),
    "optional packages imported": sorted((set(sys.modules) - modules_before).intersection(OPTIONAL)),
}))
"""


def _import_in_new_process(root: Path, modules: list[str], optional: tuple[str, ...]) -> dict[str, object]:
    script = IMPORT_EVERYTHING.replace("OPTIONAL", repr(optional))
    command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(modules)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_every_module_has_no_effect() -> None:
    """But for one, which is none of these: `import lckv.models` lets transformers' Auto classes know the
    models (tests/lckv/models/test_registration.py)."""
    modules = [
        name
        for name in modules_of(ROOT)
        if not OPTIONAL_FOLDERS.intersection(name.split(".")) and not name.endswith(".__main__")
    ]
    effects = _import_in_new_process(ROOT, sorted(modules), OPTIONAL_PACKAGES)
    assert {name: effect for name, effect in effects.items() if effect} == {}


def test_effects_of_an_import_are_seen(tmp_path: Path) -> None:
    bad = "import sys, threading, time, torch, this\ntorch.cuda.synchronize = lambda: None\n"
    bad += "torch.manual_seed(7)\nsys.argv.append('x')\n"
    bad += "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    bad += (
        "torch.distributed.init_process_group('gloo', rank=0, world_size=1, "
        "store=torch.distributed.HashStore())\n"
    )
    (tmp_path / "bad.py").write_text(bad)
    effects = _import_in_new_process(tmp_path, ["bad"], ("this",))
    assert effects.pop("patched") == ["torch.cuda.synchronize"]
    assert effects.pop("cuda initialised") is False
    assert [name for name, effect in effects.items() if not effect] == []

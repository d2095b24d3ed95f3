"""The modelling files that travel with saved weights: with them a folder loads where the package `lckv` is
not installed. Exports and `save_pretrained` both write them here.

transformers takes code from a model's folder (`trust_remote_code`) under rules of its own: all files lie flat
in one folder, they import each other as `from .name import x`, which transformers finds with a regular
expression, and a package that is imported outside of `try` must be installed. So every module of `lckv` that
the model needs, at its top or inside a function, becomes one file with rewritten imports; apart from these
lines the code is the package's. Two modules have no counterpart. The registry of KV policies looks for
folders; in its place comes a list of the policies that the model can have, which may lie outside of `lckv`.
And this one: a model that was loaded from such files is saved with a copy of them, by transformers.
"""

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lckv.policies.config import PolicyConfig
from lckv.policies.dense.config import DenseConfig
from lckv.policies.registry import config_class

PACKAGE = "lckv"
CONFIGURATION, MODEL = "lckv.models.configuration_lckv_llama", "lckv.models.modeling_lckv_llama"
HEADS = "lckv.models.classification"
_HEAD_NAMES = tuple(
    f"LCKVLlamaFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
)
REGISTRY, MYSELF = "lckv.policies.registry", "lckv.remote_code"
AUTO_MAP = {
    "AutoConfig": "modeling_lckv_llama.LCKVLlamaConfig",
    "AutoModel": "modeling_lckv_llama.LCKVLlamaModel",
    "AutoModelForCausalLM": "modeling_lckv_llama.LCKVLlamaForCausalLM",
    **{name.replace("LCKVLlama", "AutoModel"): f"modeling_lckv_llama.{name}" for name in _HEAD_NAMES},
}
"""What config.json of a model of type lckv-llama says under `auto_map`: file and class, by the Auto class
that needs them.

All name the same file: transformers imports everything that a file needs once for each file named here, and
with two copies of a class an object from one copy is not an instance of the other.
"""
_ONE_COPY = f"""

from transformers import AutoModel

from .{HEADS.replace(".", "_")} import {", ".join(_HEAD_NAMES)}

AutoModel.register(LCKVLlamaConfig, LCKVLlamaModel, exist_ok=True)  # from which the heads have their decoder

# Saved again, they name this file, not their own: see the entries of auto_map in config.json.
for _named in (LCKVLlamaConfig, {", ".join(_HEAD_NAMES)}):
    _named.__module__ = __name__
"""

_ALWAYS_THERE = frozenset({"torch", "transformers", *sys.stdlib_module_names})
"""Packages that files may import outright; all others are optional."""
_DISTRIBUTION = "lckv-megatron"


@dataclass(frozen=True)
class Bundler:
    """Turns modules of one package into flat files."""

    root: Path
    """The folder in which the package lies."""

    package: str
    """Its name."""

    entries: tuple[str, ...]
    """Modules whose files keep their own last name; all others are called after their whole path."""

    more: tuple[str, ...] = ()
    """Modules that are wanted beside the entries."""

    others: Mapping[str, Path] = field(default_factory=dict)
    """More packages whose modules become files, by dotted name,
    with the folders in which their top packages lie."""

    replaced: Mapping[str, str] = field(default_factory=dict)
    """Modules in whose place comes another text, whose imports are rewritten like all."""

    def files(self) -> dict[str, str]:
        """File name -> source text, of the modules wanted and of every module of the package that they need.

        Raises ValueError for code that cannot work in such a file.
        """
        texts: dict[str, str] = {}
        waiting = [*self.entries, *self.more]
        while waiting:
            module = waiting.pop()
            name = f"{self._flat(module)}.py"
            if name not in texts:
                texts[name], needed = self._rewrite(module)
                waiting += needed
        return dict(sorted(texts.items()))

    def _flat(self, module: str) -> str:
        return module.rpartition(".")[2] if module in self.entries else module.replace(".", "_")

    def _path(self, module: str) -> Path | None:
        root = next((root for name, root in self.others.items() if _within(module, name)), self.root)
        stem = root.joinpath(*module.split("."))
        return next(
            (path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None
        )

    def _rewrite(self, module: str) -> tuple[str, list[str]]:
        """The module's text with its imports rewritten, and the modules of the package that it imports."""
        path = self._path(module)
        assert path is not None, module
        text = self.replaced.get(module) or path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if named := [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and self._is_module_name(node.value)
        ]:
            raise ValueError(
                f"{module} names the module {named[0]!r} in a string, which is not there in a model's folder."
            )
        lines = text.splitlines()
        needed: list[str] = []
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in sorted(statements, key=lambda node: -node.lineno):
            indent = " " * node.col_offset
            replacement, modules = self._import(node, module)
            assert node.end_lineno is not None
            if replacement is not None:
                lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in replacement]
            needed += modules
        source = "/".join([*module.split(".")[:-1], path.name])
        header = [
            f"# Written by {_DISTRIBUTION} {_version()} from its {source}, for transformers.",
            "# License: Apache-2.0. Where the package is installed, `import lckv.models` takes its place.",
        ]
        return "\n".join([*header, *lines, ""]), needed

    def _is_module_name(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(rf"{self.package}(\.\w+)+", value) is not None

    def _is_own(self, module: str) -> bool:
        return any(_within(module, name) for name in (self.package, *self.others))

    def _import(self, node: ast.Import | ast.ImportFrom, module: str) -> tuple[list[str] | None, list[str]]:
        """What replaces an import statement (None: nothing), and the modules of the package that it needs."""
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(
                f"{module}, line {node.lineno}: a relative import; the packages of this project use none."
            )
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        tops = {name.partition(".")[0] for name in names}
        if any(map(self._is_own, names)):
            if isinstance(node, ast.Import):
                raise ValueError(
                    f"{module}, line {node.lineno}: 'import {names[0]}' has no counterpart in a model's "
                    "folder; write 'from ... import ...'."
                )
            return self._own_import(node)
        if tops <= _ALWAYS_THERE:
            return None, []
        # The error is the same; but transformers asks for every package that is imported outside of `try`.
        return ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"], []

    def _own_import(self, node: ast.ImportFrom) -> tuple[list[str], list[str]]:
        assert node.module is not None
        lines, objects, needed = [], [], []
        for alias in node.names:
            target = f"{node.module}.{alias.name}"
            if self._path(target) is None:
                objects.append(ast.unparse(alias))
                continue
            flat = self._flat(target)
            # The second line makes transformers see that the file is needed.
            lines += [
                f"from . import {flat} as {alias.asname or alias.name}",
                f"from .{flat} import __name__ as _",
            ]
            needed.append(target)
        if objects:
            lines.append(f"from .{self._flat(node.module)} import {', '.join(objects)}")
            needed.append(node.module)
        return lines, needed


_REGISTRY_TEXT = '''"""The KV policies that this model can have."""

from collections.abc import Mapping

from lckv.errors import Problem, SettingError
from lckv.policies.config import PolicyConfig
{imports}


def config_classes() -> Mapping[str, type[PolicyConfig]]:
    """The dataclass of each policy's settings, by the policy's name."""
    return {{kind.name: kind for kind in ({names},)}}


def config_class(name: object) -> type[PolicyConfig]:
    """The dataclass of the settings of the policy `name`. Raises SettingError where there is none."""
    known = config_classes()
    if not isinstance(name, str) or name not in known:
        obstacle = f"the KV policies of this model's files are {{', '.join(known)}}"
        raise SettingError([Problem("name", repr(name), obstacle)])
    return known[name]
'''


_MYSELF_TEXT = '''"""Saving: transformers copies the files that a model was loaded from."""

from collections.abc import Mapping
from typing import Any


def write_modelling_files(folder: Any, policy: str) -> Mapping[str, str]:
    """Nothing is written here, and config.json goes on saying what it said."""
    return {}
'''


@cache
def modelling_files(policy: str) -> Mapping[str, str]:
    """File name -> text of everything that an `lckv-llama` model with the KV policy `policy` needs beside
    torch and transformers.

    Raises ValueError for a policy whose code cannot work in such files.
    """
    kinds: dict[str, type[PolicyConfig]] = {DenseConfig.name: DenseConfig, policy: config_class(policy)}
    packages = {kind.__module__.rpartition(".")[0] for kind in kinds.values()}
    others = {name: _folder_of(name) for name in sorted(packages) if not _within(name, PACKAGE)}
    replaced = {REGISTRY: _registry([*kinds.values()]), MYSELF: _MYSELF_TEXT}
    entries = (CONFIGURATION, MODEL)
    texts = Bundler(_folder_of(PACKAGE), PACKAGE, entries, (HEADS,), others, replaced).files()
    texts["modeling_lckv_llama.py"] += _ONE_COPY
    return texts


def write_modelling_files(folder: Path, policy: str) -> Mapping[str, str]:
    """Write the modelling files of a model with the KV policy `policy` into its folder. Returns what
    config.json must say under `auto_map`.

    Raises ValueError as `modelling_files`.
    """
    texts = modelling_files(policy)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return AUTO_MAP


def _version() -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(checkout)"


def _registry(kinds: list[type[PolicyConfig]]) -> str:
    imports = [f"from {kind.__module__} import {kind.__name__}" for kind in kinds]
    return _REGISTRY_TEXT.format(imports="\n".join(imports), names=", ".join(kind.__name__ for kind in kinds))


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _folder_of(package: str) -> Path:
    """The folder in which the top of a dotted package lies."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[package.count(".") + 1]

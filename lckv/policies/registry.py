"""The KV policies that there are: folders beside this file, and packages that the environment or installed
projects name.

A policy is a package with a module `config` that has one dataclass derived from `PolicyConfig`; or a lone
module that has one, which then loads torch for its other half wherever settings are read. The variable
LCKV_POLICIES names more of them ("mine.forgetful,other.policy"); installed projects name theirs as entry
points of the group `lckv.policies`."""

import importlib
import importlib.metadata
import os
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from lckv.errors import Problem, SettingError
from lckv.policies.config import PolicyConfig

VARIABLE = "LCKV_POLICIES"
GROUP = "lckv.policies"


def config_classes() -> Mapping[str, type[PolicyConfig]]:
    """The dataclass of each policy's settings, by the policy's name."""
    return _config_classes(os.environ.get(VARIABLE, ""))


def config_class(name: object) -> type[PolicyConfig]:
    """The dataclass of the settings of the policy `name`. Raises SettingError where there is none."""
    known = config_classes()
    if not isinstance(name, str) or name not in known:
        obstacle = (
            f"the KV policies are {', '.join(known)} (more can be named in the environment variable "
            f"{VARIABLE}, as packages)"
        )
        raise SettingError([Problem("name", repr(name), obstacle)])
    return known[name]


@cache
def _config_classes(named: str) -> Mapping[str, type[PolicyConfig]]:
    classes: dict[str, type[PolicyConfig]] = {}
    for package in (*_built_in(), *filter(None, map(str.strip, named.split(","))), *_installed()):
        kind = _config_of(package)
        other = classes.setdefault(kind.name, kind)
        if other is not kind:
            raise ValueError(
                f"{other.__module__} and {kind.__module__} both define the KV policy {kind.name!r}; rename "
                "one."
            )
    return MappingProxyType(classes)


def _built_in() -> Iterator[str]:
    package = __name__.rpartition(".")[0]
    folders = (entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)]) if entry.ispkg)
    return (f"{package}.{name}" for name in sorted(folders))


def _installed() -> Iterator[str]:
    return (entry.value for entry in importlib.metadata.entry_points(group=GROUP))


def _config_of(package: str) -> type[PolicyConfig]:
    try:
        whole = importlib.import_module(package)
        module = importlib.import_module(f"{package}.config") if hasattr(whole, "__path__") else whole
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{package} is no KV policy: {error}. {VARIABLE} and entry points of {GROUP} name packages with "
            "a module config, or modules."
        ) from error
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, PolicyConfig) and kind.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise ValueError(
            f"{module.__name__} has {len(kinds)} classes derived from PolicyConfig; it must have one."
        )
    return kinds[0]

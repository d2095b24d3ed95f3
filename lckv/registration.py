"""Registers the models with transformers' Auto classes as soon as transformers is there.

Importing transformers' model classes takes seconds, which a program that only trains or plans should not
spend. So this waits for the first import of transformers, by whomever, and registers right after it.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AWAITED = "transformers"


def register() -> None:
    """Make AutoConfig and the AutoModels know `lckv-llama`. Can be called again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
    from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM, LCKVLlamaModel

    AutoConfig.register(LCKVLlamaConfig.model_type, LCKVLlamaConfig, exist_ok=True)
    AutoModel.register(LCKVLlamaConfig, LCKVLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(LCKVLlamaConfig, LCKVLlamaForCausalLM, exist_ok=True)


def register_with_transformers() -> None:
    """Register now if transformers is imported, else when it is."""
    if _AWAITED in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds transformers where Python would, with a loader that registers afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Another loader, and what comes after it."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            register()

"""What is optional: commands that install it, and what is wrong with what is installed."""

import importlib
import importlib.util

INSTALL_GPU = "pip install --no-build-isolation 'lckv-megatron[gpu]', when torch is installed"
"""flash-attn and Transformer Engine are compiled against the torch that is there, and need it when they are
built; pip's isolated builds have none."""


def why_no_function(distribution: str, module: str, function: str, version: str) -> str | None:
    """What keeps `function` of `module` from being used, which `distribution` has from `version` on; None if
    nothing does. Imports the module."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"the package {distribution} is not installed ({INSTALL_GPU})"
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return _too_old(distribution, module, version)
        return f"{distribution} cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{distribution} cannot be imported: {error}"
    return None if hasattr(loaded, function) else _too_old(distribution, f"{module}.{function}", version)


def _too_old(distribution: str, missing: str, version: str) -> str:
    return f"the package {distribution} has no {missing}, which {version} and newer has"

"""What megatron-core writes in different ways from 0.16.1 (Python 3.11) to 0.19 (Python 3.12).

Every difference that the product meets is here, under one meaning, with a test. No other file asks for the
version. Which versions were tried, and with which result: docs/engines.md.
"""

import inspect
from functools import partial
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

State = dict[str, Any]


def name_argument(name: str | None) -> dict[str, str]:
    """The name of a module as an argument for the constructor of a Megatron module.

    0.19 names the parts of its layers. Constructors of 0.16.1 do not know the argument, and get no name.
    """
    return {} if name is None else {"name": name}


def mlp(submodules: MLPSubmodules) -> Any:
    """Megatron's MLP as a part of a layer.

    0.19 calls the part and warns of a spec; 0.16.1 takes a spec only.
    """
    build = getattr(MLP, "as_mlp_submodule", None)
    return ModuleSpec(MLP, submodules=submodules) if build is None else partial(build, submodules=submodules)


def keep_settings(saved: State, optimizer: MegatronOptimizer) -> None:
    """Writes this run's settings of AdamW into the parameter groups of an optimizer's saved state: bounds of
    the learning rate, betas and epsilon. Weight decay and the learning rate itself are the schedule's.

    With other bounds in them, 0.16.1 goes on with the old ones, and 0.19 does not recognise the groups.
    """
    config = optimizer.config
    settings = {
        "max_lr": config.lr,
        "min_lr": config.min_lr,
        "betas": (config.adam_beta1, config.adam_beta2),  # one tuple for all groups, or the next save differs
        "eps": config.adam_eps,
    }
    for group in saved.get("optimizer", saved)["param_groups"]:
        group.update(settings)


def start_precision_aware_state(optimizer: Any) -> None:
    """Moments and main weights of Transformer Engine's Adam before its first step, for parameters that have
    none yet.

    Megatron calls `initialize_state` with the parameter only, as Transformer Engine 2.0 had it; later ones
    must be told whether they keep the lower halves of main weights only.
    """
    halves = "store_param_remainders"
    knows = halves in inspect.signature(optimizer.initialize_state).parameters
    options = {halves: False} if knows else {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.initialize_state(parameter, **options)

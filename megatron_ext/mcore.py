"""What megatron-core writes in different ways from 0.16.1 (Python 3.11) to 0.19 (Python 3.12).

Every difference that the product meets is here, under one meaning, with a test. No other file asks for the
version. Which versions were tried, and with which result: docs/engines.md.
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
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


def save_in_parallel(
    save: Callable[[State, Path], None], state: State, checkpoint: Path, group: dist.ProcessGroup
) -> None:
    """Calls `save` with a sharded state in which this rank owns its share of what `group` has copies of.

    Collective over all ranks: checks that the shards cover the whole.
    """
    FullyParallelSaveStrategyWrapper(_Saving(save), group).save(state, checkpoint)


def load_in_parallel(
    load: Callable[[State, Path], State], state: State, checkpoint: Path, group: dist.ProcessGroup
) -> State:
    """A sharded state with its tensors. Each rank of `group` reads a share with `load` and sends it around.

    Collective over all ranks.
    """
    return FullyParallelLoadStrategyWrapper(_Loading(load), group).load(state, checkpoint)


class _Saving:
    """What Megatron's wrapper takes for a strategy of its own.
    That of 0.16.1 reads name and version of the format."""

    backend, version = "torch_dist", 1

    def __init__(self, save: Callable[[State, Path], None]) -> None:
        self.save = save


class _Loading:
    """What Megatron's wrapper takes for a strategy of its own. That of 0.19 adds who wrote the checkpoint in
    the background; the files do not depend on it."""

    def __init__(self, load: Callable[[State, Path], State]) -> None:
        self._load = load

    def load(self, state: State, checkpoint: Path, async_strategy: str = "mcore") -> State:
        del async_strategy
        return self._load(state, checkpoint)


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

"""The state of an optimizer where Megatron does not bring it from one step to the next by itself: before the
first step, and in loading."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_ext.checkpointing.slices import settings_of, slices_of, take_slices
from megatron_ext.mcore import start_precision_aware_state

State = dict[str, Any]
WHOLE = "fully_reshardable"
"""Megatron's name of the format in which the state of each weight is one tensor."""


def leaves_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that one is made of; itself, if it is one."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def states_of_leaves(state: Any, optimizer: MegatronOptimizer) -> list[tuple[State, MegatronOptimizer]]:
    """Each single optimizer with its part of the state."""
    leaves = leaves_of(optimizer)
    return [(state if len(leaves) == 1 else state[i], leaf) for i, leaf in enumerate(leaves)]


def optimizer_entries(
    optimizer: MegatronOptimizer, model: State, stored: Collection[str] | None, metadata: State
) -> State:
    """What of an optimizer is saved, or loaded from a checkpoint with the keys `stored`.

    `model` is the sharded state of its model; `metadata` says which of its formats Megatron is to use."""
    leaves, is_loading = leaves_of(optimizer), stored is not None
    if metadata["distrib_optim_sharding_type"] != WHOLE or not any(map(_is_distributed, leaves)):
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    if len(leaves) > 1:
        optimizer._synchronize_steps()
    states = [
        {
            **settings_of(leaf),
            "param_state": slices_of(leaf, model, stored),
            "param_state_sharding_type": WHOLE,
        }
        if isinstance(leaf, DistributedOptimizer)
        else leaf.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        for leaf in leaves
    ]
    by_number: dict[Any, Any] = dict(enumerate(states))
    return states[0] if len(states) == 1 else by_number


def _is_distributed(leaf: MegatronOptimizer) -> bool:
    return isinstance(leaf, DistributedOptimizer)


_SETTINGS_OF_ADAM = ("lr", "weight_decay", "betas", "eps")


def _groups_and_places(state: Any, optimizer: MegatronOptimizer) -> Iterator[tuple[State, State]]:
    """The parameter groups of an offloaded optimizer in a saved state, each with what says where the
    optimizer keeps what."""
    for of_leaf, leaf in states_of_leaves(state, optimizer):
        if isinstance(leaf.optimizer, HybridDeviceOptimizer):
            defaults = leaf.optimizer.defaults
            places = {name: defaults[name] for name in defaults if name not in _SETTINGS_OF_ADAM}
            for group in of_leaf.get("optimizer", of_leaf)["param_groups"]:
                yield group, places


def leave_out_places(state: Any, optimizer: MegatronOptimizer) -> None:
    """Leaves off, of an optimizer's state that is to be saved, what says where an offloaded optimizer keeps
    what: there are classes in it, which reading refuses, and the next run may offload nothing."""
    for group, places in _groups_and_places(state, optimizer):
        for name in places:
            group.pop(name, None)


def put_places(state: Any, optimizer: MegatronOptimizer) -> None:
    """Puts into a loaded state what `leave_out_places` left off, as this run has it."""
    for group, places in _groups_and_places(state, optimizer):
        group.update(places)


def place_step(state: State, optimizer: MegatronOptimizer) -> None:
    """Puts the number of steps where the optimizer that is here looks for it, whichever one wrote `state`.

    torch's Adam counts for every parameter; Megatron saves that as one number, and leaves out a 0. Fused ones
    (Transformer Engine, apex) count for every group, and take no number of a parameter.
    """
    groups, step = state["param_groups"], state["state"].pop("common_step", None)
    if step is None:
        step = next((group["step"] for group in groups if "step" in group), 0)
    if isinstance(optimizer.optimizer, torch.optim.Adam):  # AdamW is one
        state["state"]["common_step"] = torch.tensor(float(step))
        return
    for group in groups:
        group["step"] = int(step)


def load_distributed_optimizer(optimizer: DistributedOptimizer, state: State) -> None:
    """Loads in two steps, because megatron-core is wrong in one with torch's Adam, the optimizer without
    Transformer Engine.

    It then asks for a `step` among the tensors, where there is none, and it gives all weights one and the
    same step tensor: each would advance the step of all others.
    """
    tensors = state.get("param_state", {})  # none where all of this rank's range is padding
    optimizer.load_state_dict(
        {key: value for key, value in state.items() if not key.startswith("param_state")}
    )
    inner_states = optimizer.optimizer.state
    steps = {
        parameter: inner.pop("step").clone() for parameter, inner in inner_states.items() if "step" in inner
    }
    with torch.no_grad():  # in float32 the main weights are the model's own
        if state["param_state_sharding_type"] == WHOLE:
            take_slices(optimizer, tensors)
        else:
            optimizer.load_parameter_state_from_dp_reshardable(tensors)
    for parameter, step in steps.items():
        inner_states[parameter]["step"] = step


def fill_missing_state(optimizer: MegatronOptimizer) -> None:
    """Gives an optimizer that has not stepped yet the zeros that it would start from;
    Megatron cannot save or load without."""
    for leaf in leaves_of(optimizer):
        inner = leaf.optimizer
        if isinstance(inner, HybridDeviceOptimizer):
            _fill_offloaded(inner)
        elif inner is not None and leaf.init_state_fn is not None:
            if leaf.config.use_precision_aware_optimizer:
                start_precision_aware_state(inner)
            else:
                leaf.init_state_fn(inner, leaf.config)
            _count_steps(inner)


def _fill_offloaded(optimizer: HybridDeviceOptimizer) -> None:
    """Megatron would make a step with random gradients instead, which changes the weights."""
    for part in optimizer.sub_optimizers:
        for group in part.param_groups:
            for parameter in group["params"]:
                for name in ("exp_avg", "exp_avg_sq"):
                    part.state[parameter].setdefault(name, torch.zeros_like(parameter))
        _count_steps(part)
    optimizer._sync_sub_optimizers_state_to_hdo()


def _count_steps(optimizer: torch.optim.Optimizer) -> None:
    """torch's Adam counts for every parameter."""
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("step", torch.tensor(0.0, dtype=torch.float32))

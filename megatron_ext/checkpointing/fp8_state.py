"""What Transformer Engine keeps for delayed FP8 scaling, in checkpoints: scales and the largest numbers of
earlier steps, of each layer.

Transformer Engine hands it out and takes it as a pickle in a tensor, its "extra state". Checkpoints hold its
tensors instead, so that nothing that comes from a file is unpickled; the pickle that Transformer Engine takes
is made here. Other recipes keep nothing. A run can go on with a checkpoint that has no such state, or has it
in vain: without it, scales begin afresh.
"""

import pickle
from collections.abc import Collection
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing import ShardedObject
from torch import Tensor

from megatron_ext.checkpointing.errors import DamagedCheckpointError

State = dict[str, Any]

EXTRA_STATE = "_extra_state"
_TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
_VARIABLES = "extra_fp8_variables"


def scaling_states(chunk: torch.nn.Module, entries: State, *, is_loading: bool) -> State:
    """Of what Megatron would save of `chunk`, the entries of delayed scaling, as tensors; empty without
    delayed scaling. For loading: those of all layers that may have some."""
    if not _scales_later(chunk):
        return {}
    states = {}
    for key, entry in entries.items():
        if key.endswith(EXTRA_STATE) and isinstance(entry, ShardedObject):
            entry.data = {} if is_loading else _as_tensors(entry.data)
            if is_loading or entry.data:
                states[key] = entry
    return states


def _scales_later(chunk: torch.nn.Module) -> bool:
    config: Any = getattr(chunk, "config", None)
    return bool(getattr(config, "fp8", None)) and config.fp8_recipe == "delayed"


def _as_tensors(extra_state: object) -> State:
    """What a layer of this process has handed out; empty where it keeps nothing (yet)."""
    if not isinstance(extra_state, Tensor) or extra_state.numel() == 0:
        return {}
    content = pickle.loads(extra_state.cpu().numpy().tobytes())  # noqa: S301 - this process made it
    if any(name not in content for name in _TENSORS):
        return {}
    variables = {
        name: value
        for name, value in content.get(_VARIABLES, {}).items()
        if isinstance(value, bool | int | float | str)
    }
    return {**{name: content[name] for name in _TENSORS}, _VARIABLES: variables}


def leave_out_unsaved(stored: Collection[str], state: State) -> None:
    """Takes out of what is to be loaded the entries of delayed scaling that a checkpoint with the keys
    `stored` does not have."""
    for entries in state.values():
        for key, entry in list(entries.items()):
            is_scaling = key.endswith(EXTRA_STATE) and isinstance(entry, ShardedObject)
            if is_scaling and entry.unique_key not in stored:
                del entries[key]


def give_back(chunk: torch.nn.Module, entries: State) -> None:
    """Turns loaded entries of delayed scaling, in place, into what the layers of `chunk` take.

    Raises DamagedCheckpointError where one holds something else.
    """
    loaded = [key for key, entry in entries.items() if key.endswith(EXTRA_STATE) and isinstance(entry, dict)]
    if loaded:
        recipe = fp8_utils.get_fp8_recipe(chunk.config)
        for key in loaded:
            entries[key] = _as_extra_state(key, entries[key], recipe)


def _as_extra_state(key: str, saved: State, recipe: object) -> Tensor:
    variables = saved.get(_VARIABLES)
    wrong = [name for name in _TENSORS if not isinstance(saved.get(name), Tensor)]
    if wrong or not isinstance(variables, dict):
        raise DamagedCheckpointError(
            f"checkpoint.load: {key} is no FP8 scaling: {', '.join(wrong or [_VARIABLES])} is missing. Load "
            "another checkpoint"
        )
    content = {"recipe": recipe, _VARIABLES: variables, **{name: saved[name] for name in _TENSORS}}
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)

"""The settings of NVIDIA's published DMC models (Llama-2-7B-DMC-4x and its siblings), from the arguments of
the training program that made them."""

from collections.abc import Mapping
from typing import Any

from lckv.errors import Problem, SettingError
from lckv.policies.dmc.config import DMCConfig

_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_OWN = "dmc_"
"""Begins the names of the program's arguments for DMC."""


def from_arguments(arguments: Mapping[str, Any]) -> DMCConfig | None:
    """See `PolicyConfig.from_megatron_arguments`."""
    if not any(name.startswith(_OWN) for name in arguments):
        return None
    stage = "finetune"  # also the stage of a finished model
    if _flag(arguments, "dmc_is_stage_one"):
        stage = "zero_out"
    elif "dmc_finetune" in arguments and not _flag(arguments, "dmc_finetune"):
        stage = "retrofit"
    return DMCConfig(
        stage=stage,  # type: ignore[arg-type]
        target_compression_ratio=_number(arguments, "dmc_cr", None),
        initial_decision_bias=_number(arguments, "dmc_init_val", 5.0),
        temperature=_number(arguments, "dmc_temp", 0.1),
        window=int(_number(arguments, "dmc_window_size", 12, whole=True)),
        eps=_EPS[arguments["params_dtype"]],  # of the training's dtype, whatever the model will run in
    )


def _flag(arguments: Mapping[str, Any], name: str) -> bool:
    value = arguments.get(name)
    if value is not None and type(value) is not bool:
        raise SettingError([Problem(name, repr(value), "it must be True or False")])
    return bool(value)


def _number(arguments: Mapping[str, Any], name: str, default: float | None, *, whole: bool = False) -> float:
    value = arguments.get(name)
    value = default if value is None else value
    if value is None:
        raise SettingError(
            [Problem(name, "not there", "it is needed: give it, such as 4 for Llama-2-7B-DMC-4x")]
        )
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not value > 0:
        needed = "it must be an integer of at least 1" if whole else "it must be a number above 0"
        raise SettingError([Problem(name, repr(value), needed)])
    return float(value)

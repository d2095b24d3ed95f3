"""Rotary position embedding in a Hugging Face config.

transformers 5 has one field rope_parameters {rope_type, rope_theta, factor, ...}; transformers 4 has
rope_theta and rope_scaling {rope_type or type, factor, ...}. Both are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatron_ext.config import ModelConfig, RopeScalingConfig

FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
"""The fields that this module reads."""
DEFAULT_BASE = 10000.0
"""What transformers assumes where a config gives no base."""
_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}
"""From Hugging Face's names of scalings to `RopeScalingConfig.type`."""
_PARAMETERS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_INTEGERS = ("original_max_position_embeddings",)


def rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What the model here cannot do, or what contradicts itself, in the rotary embedding of a Hugging Face
    config."""
    spellings = {
        name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name) is not None
    }
    for name, value in spellings.items():
        if not isinstance(value, Mapping):
            yield f"{name} is {value!r}; it must be null or a mapping with rope_type."
            return
        yield from _scaling_problems(name, value)
    if len(spellings) == 2 and _scaling(spellings["rope_parameters"]) != _scaling(spellings["rope_scaling"]):
        yield (
            f"rope_parameters is {config['rope_parameters']} and rope_scaling is {config['rope_scaling']}; "
            "they differ."
        )
    bases = [
        value
        for value in (config.get("rope_theta"), *(s.get("rope_theta") for s in spellings.values()))
        if value is not None
    ]
    for base in bases:
        if not _is_number(base):
            yield f"rope_theta is {base!r}; it must be a number."
        elif base != bases[0]:
            yield f"rope_theta is {bases[0]} and {base} in two places; there can be only one."
    fractions = [values.get("partial_rotary_factor") for values in (config, *spellings.values())]
    for value in fractions:
        if value not in (None, 1):
            yield f"partial_rotary_factor is {value!r}; only whole heads can be rotated: 1.0 or left out."


def _scaling_problems(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    kind = _kind(values)
    if kind not in _TYPES:
        yield f"{name}.rope_type is {kind!r}; {', '.join(_TYPES)} can be converted."
        return
    needed = _PARAMETERS[_TYPES[kind]]
    for key in needed:
        value = values.get(key)
        if key in _INTEGERS and not (_is_number(value) and isinstance(value, int)):
            yield f"{name}.{key} is {value!r}; rope_type {kind} needs an integer."
        elif not _is_number(value):
            yield f"{name}.{key} is {value!r}; rope_type {kind} needs a number."
    known = {*needed, "type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if values.get("type") not in (None, kind):
        yield f"{name}.type is {values['type']!r} and {name}.rope_type is {kind!r}; they must be equal."
    for key in values:
        if key not in known and values[key] is not None:
            yield f"{name}.{key} is {values[key]!r}; with rope_type {kind} this field has no known meaning."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type") or values.get("type") or "default"


def _scaling(values: Mapping[str, Any]) -> RopeScalingConfig:
    kind = _TYPES.get(_kind(values), "none")
    given = {
        key: (int if key in _INTEGERS else float)(values[key])
        for key in _PARAMETERS[kind]
        if _is_number(values.get(key))
    }
    return RopeScalingConfig(type=kind, **given)  # type: ignore[arg-type]


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a config without `rope_problems` means."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    bases = (parameters.get("rope_theta"), scaling.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE)
    return {
        "rotary_base": float(next(base for base in bases if base is not None)),
        "rope_scaling": _scaling(scaling),
    }


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it."""
    kind = model.rope_scaling.type
    name = next(theirs for theirs, ours in _TYPES.items() if ours == kind)
    values = asdict(model.rope_scaling)
    parameters = {key: values[key] for key in _PARAMETERS[kind]}
    return {"rope_parameters": {"rope_type": name, "rope_theta": model.rotary_base, **parameters}}


def write_old_rope(model: ModelConfig) -> dict[str, Any]:
    """The same as transformers 4 writes it. Software that does not know rope_parameters would silently take
    another base."""
    parameters = write_rope(model)["rope_parameters"]
    base = parameters.pop("rope_theta")
    return {"rope_theta": base, "rope_scaling": None if model.rope_scaling.type == "none" else parameters}

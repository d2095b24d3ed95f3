"""Rotary position embedding in a Hugging Face config.

transformers 5 has one field rope_parameters {rope_type, rope_theta, factor, ...}. transformers 4 has
rope_theta and rope_scaling {rope_type or type, factor, ...}. Both are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from lckv.reading import is_of_kind
from lckv.rope import LinearScaling, Llama3Scaling

FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
"""The fields that this module reads."""
DEFAULT_BASE = 10000.0
"""What transformers assumes where a config gives no base."""
_SCALINGS: dict[str, type[LinearScaling] | type[Llama3Scaling] | None] = {
    "default": None,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
}
"""By the rope_type in a config; the fields of the dataclass are the parameters that the config gives."""


def rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What has no meaning here, or contradicts itself, in the rotary embedding of a Hugging Face config."""
    spellings = {
        name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name) is not None
    }
    for name, value in spellings.items():
        if not isinstance(value, Mapping):
            yield f"{name} is {value!r}; it must be null or a mapping with rope_type."
            return
        yield from _scaling_problems(name, value)
    if len(spellings) == 2 and _given(spellings["rope_parameters"]) != _given(spellings["rope_scaling"]):
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
        if not is_of_kind(base, float):
            yield f"rope_theta is {base!r}; it must be a number."
        elif base != bases[0]:
            yield f"rope_theta is {bases[0]} and {base} in two places; there can be only one."
    fractions = [values.get("partial_rotary_factor") for values in (config, *spellings.values())]
    for value in fractions:
        if value not in (None, 1):
            yield f"partial_rotary_factor is {value!r}; only whole heads can be rotated: 1.0 or left out."


def _scaling_problems(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    kind = _kind(values)
    if kind not in _SCALINGS:
        yield f"{name}.rope_type is {kind!r}; it must be one of {', '.join(_SCALINGS)}."
        return
    needed = _parameters(kind)
    for key, number in needed.items():
        if not is_of_kind(values.get(key), number):
            words = "an integer" if number is int else "a number"
            yield f"{name}.{key} is {values.get(key)!r}; rope_type {kind} needs {words}."
    known = {*needed, "type", "rope_type", "rope_theta", "partial_rotary_factor"}
    if values.get("type") not in (None, kind):
        yield f"{name}.type is {values['type']!r} and {name}.rope_type is {kind!r}; they must be equal."
    for key in values:
        if key not in known and values[key] is not None:
            yield f"{name}.{key} is {values[key]!r}; with rope_type {kind} this field has no known meaning."


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type") or values.get("type") or "default"


def _parameters(kind: str) -> dict[str, type]:
    """The parameters of a scaling, and which numbers they are."""
    scaling = _SCALINGS[kind]
    return {} if scaling is None else {entry.name: entry.type for entry in fields(scaling)}  # type: ignore[misc]


def _given(values: Mapping[str, Any]) -> tuple[object, ...]:
    """What a spelling says, to compare two of them."""
    kind = _kind(values)
    return kind, *(values.get(key) for key in (_parameters(kind) if kind in _SCALINGS else ()))


def read_rope(config: Mapping[str, Any]) -> tuple[float, LinearScaling | Llama3Scaling | None]:
    """Base and scaling of a config without `rope_problems`."""
    parameters = config.get("rope_parameters") or {}
    values = config.get("rope_scaling") or parameters
    bases = (parameters.get("rope_theta"), values.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE)
    base = float(next(base for base in bases if base is not None))
    scaling = _SCALINGS[_kind(values)]
    if scaling is None:
        return base, None
    numbers = {key: number(values[key]) for key, number in _parameters(_kind(values)).items()}
    return base, scaling(**numbers)


def write_rope(base: float, scaling: LinearScaling | Llama3Scaling | None) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it."""
    name = next(
        name
        for name, kind in _SCALINGS.items()
        if type(scaling) is kind or (scaling is None and kind is None)
    )
    parameters = {} if scaling is None else asdict(scaling)
    return {"rope_parameters": {"rope_type": name, "rope_theta": base, **parameters}}


def write_old_rope(base: float, scaling: LinearScaling | Llama3Scaling | None) -> dict[str, Any]:
    """The same as transformers 4 writes it. Software that does not know rope_parameters
    would silently take another base."""
    parameters = write_rope(base, scaling)["rope_parameters"]
    del parameters["rope_theta"]
    return {"rope_theta": base, "rope_scaling": None if scaling is None else parameters}

"""Rotary position embedding in a Hugging Face config.

transformers 5 has one field rope_parameters {rope_type, rope_theta, factor, ...}. transformers 4 has
rope_theta and rope_scaling {rope_type or type, factor, ...}. Both are read. The context of pretraining,
original_max_position_embeddings, is a parameter or a field of the config.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, get_type_hints

from lckv.reading import describe, fits, is_of_kind, read
from lckv.rope_scaling import SCALINGS, LongRopeScaling, Scaling, YarnScaling, type_of

ORIGINAL = "original_max_position_embeddings"
FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", ORIGINAL)
"""The fields that this module reads."""
DEFAULT_BASE = 10000.0
"""What transformers assumes where a config gives no base."""
_UNSCALED = "default"
"""The rope_type without scaling."""


def rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What has no meaning here, or contradicts itself, in the rotary embedding of a Hugging Face config."""
    original = config.get(ORIGINAL)
    spellings = {
        name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name) is not None
    }
    for name, value in spellings.items():
        if not isinstance(value, Mapping):
            yield f"{name} is {value!r}; it must be null or a mapping with rope_type."
            return
        yield from _scaling_problems(name, value, original)
    kinds = [_kind(value) for value in spellings.values()] or [_UNSCALED]
    given = [_given(value, original) for value in spellings.values()]
    if len(spellings) == 2 and (kinds[0] != kinds[1] or given[0] != given[1]):
        yield (
            f"rope_parameters is {config['rope_parameters']} and rope_scaling is {config['rope_scaling']}; "
            "they differ."
        )
    if original is not None and all(_is_known(kind) and ORIGINAL not in _parameters(kind) for kind in kinds):
        yield (
            f"{ORIGINAL} is {original!r}; with rope_type {kinds[0]} this field has no known meaning: remove "
            "it."
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


def _scaling_problems(name: str, values: Mapping[str, Any], original: Any) -> Iterator[str]:
    """`original`: what the config itself says of the context of pretraining."""
    kind = _kind(values)
    if not _is_known(kind):
        yield f"{name}.rope_type is {kind!r}; it must be one of {', '.join((_UNSCALED, *SCALINGS))}."
        return
    hints = _parameters(kind)
    given = _given(values, original)
    for key, hint in hints.items():
        if not fits(hint, given.get(key)) and not (given.get(key) is None and _has_default(kind, key)):
            yield f"{name}.{key} is {given.get(key)!r}; rope_type {kind} needs {describe(hint)}."
    if values.get("type") not in (None, kind):
        yield f"{name}.type is {values['type']!r} and {name}.rope_type is {kind!r}; they must be equal."
    known = {*hints, "type", "rope_type", "rope_theta", "partial_rotary_factor"}
    for key in values:
        if key not in known and values[key] is not None:
            yield f"{name}.{key} is {values[key]!r}; with rope_type {kind} this field has no known meaning."
    if original is not None and values.get(ORIGINAL) not in (None, original):
        yield f"{ORIGINAL} is {original} and {name}.{ORIGINAL} is {values[ORIGINAL]}; they must be equal."


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type") or values.get("type") or _UNSCALED


def _is_known(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == _UNSCALED or kind in SCALINGS)


def _parameters(kind: str) -> dict[str, Any]:
    """The parameters of a scaling, with their types."""
    return {} if kind == _UNSCALED else get_type_hints(SCALINGS[kind])


def _has_default(kind: str, key: str) -> bool:
    """Whether a parameter may be left out."""
    if key == ORIGINAL and SCALINGS[kind] in (YarnScaling, LongRopeScaling):
        return True  # max_position_embeddings, as in transformers
    return any(entry.name == key and entry.default is not MISSING for entry in fields(SCALINGS[kind]))


def _given(values: Mapping[str, Any], original: Any) -> dict[str, Any]:
    """The parameters that a spelling gives, and what the config gives in place of one."""
    kind = _kind(values)
    known = _parameters(kind) if _is_known(kind) else {}
    given = {key: values[key] for key in known if values.get(key) is not None}
    return {ORIGINAL: original, **given} if ORIGINAL in known and original is not None else given


def read_rope(config: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, Scaling | None]:
    """Base and scaling of a config without `rope_problems`. A context of pretraining that is not given is
    `max_position_embeddings`."""
    parameters = config.get("rope_parameters") or {}
    values = config.get("rope_scaling") or parameters
    bases = (parameters.get("rope_theta"), values.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE)
    base = float(next(base for base in bases if base is not None))
    kind = _kind(values)
    if kind == _UNSCALED:
        return base, None
    given = _given(values, config.get(ORIGINAL))
    if ORIGINAL in _parameters(kind):
        given.setdefault(ORIGINAL, max_position_embeddings)
    return base, read(SCALINGS[kind], given)


def write_rope(base: float, scaling: Scaling | None) -> dict[str, Any]:
    """The rotary embedding as transformers 5 writes it."""
    kind = _UNSCALED if scaling is None else type_of(scaling)
    given = {} if scaling is None else asdict(scaling)
    parameters = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if value is not None
    }
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **parameters}}


def write_old_rope(base: float, scaling: Scaling | None) -> dict[str, Any]:
    """The same as transformers 4 writes it. Software that does not know rope_parameters
    would silently take another base."""
    parameters = write_rope(base, scaling)["rope_parameters"]
    del parameters["rope_theta"]
    # Where transformers 4 looks for it.
    outside = {ORIGINAL: parameters[ORIGINAL]} if isinstance(scaling, LongRopeScaling) else {}
    return {"rope_theta": base, "rope_scaling": None if scaling is None else parameters, **outside}

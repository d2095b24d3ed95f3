"""opt-llama and cla-llama, the kinds of models that the first version of the published LCKV code saved.

Their maps are texts such as 0_1_1_2_0, one number per layer, with other meanings than those of this project.

opt-llama: 0 reads its own keys and values, 1 those of the target layer, 2 is the target layer itself. No
layer sees the query's own position, neither in training nor in decoding, those of kind 0 included:
force_nodiag. Of the passes over the layers, m go without gradient and b with; a config gives num_encoders =
m + b - 1 and num_trained_encoders = b - 1. (After the last pass the published code lets the target layer, and
kind 1 above it, read the keys and values of the pass before; this project lets them read those of the last
one. Once the passes have converged, and in decoding token by token, the two are the same.)

cla-llama: 0 and 2 read their own, 1 those of the nearest layer below that has its own. All see the query's
own position. Nothing is iterated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.base import Family
from lckv.families.fields import LLAMA_FIXED, Fixed
from lckv.families.llama import LLAMA
from lckv.families.windows import CompressionFields
from lckv.reading import describe, is_of_kind

_OWN, _SHARED, _TARGET = "0", "1", "2"


def _kinds(config: Mapping[str, Any], num_layers: int) -> list[str]:
    """The kind of every layer, from layer_types."""
    text = config.get("layer_types")
    kinds = [_OWN] * num_layers if text is None else text.split("_") if isinstance(text, str) else []
    if len(kinds) != num_layers or not {_OWN, _SHARED, _TARGET}.issuperset(kinds):
        raise ModelError(
            f"layer_types is {text!r}; it must be null or {num_layers} times 0, 1 or 2 joined by '_', one "
            "per layer."
        )
    return kinds


def _number(config: Mapping[str, Any], name: str, default: int, least: int | None = 0) -> int:
    value: Any = config.get(name)
    if value is None:
        return default
    if not is_of_kind(value, int) or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise ModelError(f"{name} is {value!r}; it must be {describe(int)}{at_least}.")
    return value


def _kinds_and_target(config: Mapping[str, Any], num_layers: int) -> tuple[list[str], int]:
    """The kind of every layer of an opt-llama, and the index of the layer that kind 1 reads."""
    if config.get("num_warmup_layers") is None:
        target = _number(config, "target_layer", -1, least=None)
        if not -num_layers <= target < num_layers:
            raise ModelError(f"target_layer is {target}; there are {num_layers} layers.")
        return _kinds(config, num_layers), target % num_layers
    own = _number(config, "num_warmup_layers", 0)
    if any(config.get(name) is not None for name in ("layer_types", "target_layer")):
        raise ModelError(
            "num_warmup_layers is given beside layer_types or target_layer; it is the older way to say the "
            "same: remove one."
        )
    if own >= num_layers:
        raise ModelError(f"num_warmup_layers is {own}; it must be less than num_hidden_layers, {num_layers}.")
    return [_OWN] * own + [_SHARED] * (num_layers - own - 1) + [_TARGET], num_layers - 1


def _read_opt(config: Mapping[str, Any], num_layers: int) -> CompressionConfig:
    kinds, target = _kinds_and_target(config, num_layers)
    problems = list(_target_problems(kinds, target))
    if problems:
        raise ModelError("\n".join(problems))
    encoders = _number(config, "num_encoders", 8)
    trained = _number(config, "num_trained_encoders", 1)
    if trained > encoders:
        raise ModelError(f"num_trained_encoders is {trained}; it must be at most num_encoders, {encoders}.")
    return CompressionConfig(
        layer_types="_".join(str(target if kind == _SHARED else index) for index, kind in enumerate(kinds)),
        forward_passes=encoders - trained,
        backward_passes=trained + 1,
        force_nodiag=True,
    )


def _target_problems(kinds: Sequence[str], target: int) -> Iterator[str]:
    for index, kind in enumerate(kinds):
        if kind == _TARGET and index != target:
            yield f"layer_types has a 2 for layer {index}; only target_layer, {target}, can be one."
    if _SHARED in kinds and kinds[target] == _SHARED:
        yield f"target_layer is {target}, which is 1 in layer_types: it computes no keys and values to read."


def _read_cla(config: Mapping[str, Any], num_layers: int) -> CompressionConfig:
    kinds = _kinds(config, num_layers)
    if kinds[0] == _SHARED:
        raise ModelError("layer_types begins with 1; there is no layer below whose keys and values it reads.")
    sources: list[int] = []
    for index, kind in enumerate(kinds):
        sources.append(sources[-1] if kind == _SHARED else index)
    return CompressionConfig(layer_types="_".join(map(str, sources)))


def _never(compression: CompressionConfig, num_layers: int) -> Any:
    raise AssertionError("families that are only read are never written")


OPT_LLAMA = replace(
    LLAMA,
    name="opt-llama",
    fixed=LLAMA_FIXED
    | {
        "train_kv": Fixed(
            False,
            "true trained the model with a loss on the difference of the keys and values of two passes, "
            "which no map expresses",
        )
    },
    compression=CompressionFields(
        names=("layer_types", "target_layer", "num_encoders", "num_trained_encoders", "num_warmup_layers"),
        read=_read_opt,
        problems=_never,
        write=_never,
    ),
    read_only=True,
)
"""The first published LCKV models."""

CLA_LLAMA: Family = replace(
    LLAMA,
    name="cla-llama",
    compression=CompressionFields(names=("layer_types",), read=_read_cla, problems=_never, write=_never),
    read_only=True,
)
"""Models of Cross-Layer Attention by the same code."""

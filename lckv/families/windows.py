"""Sliding windows of the layers, as the families write them, and as sharing maps: 0_1s_2s, each layer reading
its own keys and values.

transformers and this project agree on what a window of W is: a token sees itself and the W - 1 before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.reading import is_of_kind

_KINDS = {"full_attention": False, "sliding_attention": True}
_DEFAULT_WINDOW = 4096
"""What transformers assumes where a config says nothing."""
_DEFAULT_MAX_WINDOW_LAYERS = 28


@dataclass(frozen=True)
class CompressionFields:
    """How a family writes down which keys and values a layer sees."""

    names: tuple[str, ...]
    """The config fields that say it."""

    read: Callable[[Mapping[str, Any], int], CompressionConfig]
    """From the config and its number of layers. Raises ModelError where the fields make no sense."""

    problems: Callable[[CompressionConfig, int], Iterator[str]]
    """What the family cannot express; both of a model."""

    write: Callable[[CompressionConfig, int], dict[str, Any]]
    """Back to config fields; there are no `problems`."""


def _plain_problems(compression: CompressionConfig, num_layers: int) -> Iterator[str]:
    """Everything but windows that makes a model another one than a plain transformer."""
    layers = compression.map(num_layers)
    if any(layer.source != layer.index for layer in layers):
        yield f"compression.layer_types is {layers}: layers read the keys and values of others"
    elif layers.lenders:
        yield f"compression.layer_types is {layers}: layers mix keys and values of others into their own"
    if compression.force_nodiag:
        yield "compression.force_nodiag is true: no token sees itself"
    if compression.policy.name != "dense":
        yield f"compression.policy.name is {compression.policy.name}: not every token is kept"


def _windows(sliding: Sequence[bool], window: int | None) -> CompressionConfig:
    if not any(sliding):
        return CompressionConfig()
    entries = (f"{index}{'s' if slides else ''}" for index, slides in enumerate(sliding))
    return CompressionConfig(layer_types="_".join(entries), sliding_window=window)


def _sliding(compression: CompressionConfig, num_layers: int) -> list[bool]:
    return [layer.sliding for layer in compression.map(num_layers)]


def _full_only(compression: CompressionConfig, num_layers: int) -> Iterator[str]:
    yield from _plain_problems(compression, num_layers)
    if any(_sliding(compression, num_layers)):
        yield f"compression.layer_types is {compression.layer_types}: layers have a window"


NO_WINDOWS = CompressionFields(
    names=(),
    read=lambda config, num_layers: CompressionConfig(),
    problems=_full_only,
    write=lambda compression, num_layers: {},
)
"""Every layer sees everything (Llama)."""


def _read_one_window(config: Mapping[str, Any], num_layers: int) -> CompressionConfig:
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    if window is not None and not _is_window(window):
        raise ModelError(f"sliding_window is {window!r}; it must be null or a number of tokens, at least 1.")
    return _windows([window is not None] * num_layers, window)


def _all_or_none(compression: CompressionConfig, num_layers: int) -> Iterator[str]:
    yield from _plain_problems(compression, num_layers)
    sliding = _sliding(compression, num_layers)
    if any(sliding) and not all(sliding):
        yield (
            f"compression.layer_types is {compression.layer_types}: some layers have a window and some have "
            "none"
        )


def _is_window(value: object) -> bool:
    return is_of_kind(value, int) and cast(int, value) >= 1


ONE_WINDOW = CompressionFields(
    names=("sliding_window",),
    read=_read_one_window,
    problems=_all_or_none,
    write=lambda compression, num_layers: {"sliding_window": compression.sliding_window},
)
"""All layers have the same window, or none has (Mistral)."""


def _layer_window_problems(config: Mapping[str, Any], num_layers: int) -> Iterator[str]:
    kinds = config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and len(kinds) == num_layers and all(k in _KINDS for k in kinds)
    ):
        yield f"layer_types is {kinds!r}; it must be null or {num_layers} times one of {', '.join(_KINDS)}."
        return
    uses = config.get("use_sliding_window")
    if uses not in (None, False, True):
        yield f"use_sliding_window is {uses!r}; it must be true or false."
    first = config.get("max_window_layers")
    if first is not None and not is_of_kind(first, int):
        yield f"max_window_layers is {first!r}; it must be an integer."
        return
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    if any(_sliding_layers(config, num_layers)) and not (uses and _is_window(window)):
        yield (
            f"use_sliding_window is {uses} and sliding_window is {window!r}, but some layers have a window "
            "(layer_types, max_window_layers); these need true and a number of tokens, at least 1."
        )


def _sliding_layers(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    if config.get("layer_types") is not None:
        return [_KINDS[kind] for kind in config["layer_types"]]
    first = config.get("max_window_layers")
    first = _DEFAULT_MAX_WINDOW_LAYERS if first is None else first
    uses = (
        bool(config.get("use_sliding_window")) and config.get("sliding_window", _DEFAULT_WINDOW) is not None
    )
    return [uses and index >= first for index in range(num_layers)]


def _read_layer_windows(config: Mapping[str, Any], num_layers: int) -> CompressionConfig:
    problems = list(_layer_window_problems(config, num_layers))
    if problems:
        raise ModelError("\n".join(problems))
    return _windows(_sliding_layers(config, num_layers), config.get("sliding_window", _DEFAULT_WINDOW))


def _write_layer_windows(compression: CompressionConfig, num_layers: int) -> dict[str, Any]:
    sliding = _sliding(compression, num_layers)
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": compression.sliding_window,
        "max_window_layers": sliding.index(True) if any(sliding) else num_layers,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
    }


WINDOW_PER_LAYER = CompressionFields(
    names=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    read=_read_layer_windows,
    problems=_plain_problems,
    write=_write_layer_windows,
)
"""Each layer has the window or sees everything (Qwen): layer_types lists it; without the list, the layers
from max_window_layers on have it if use_sliding_window is true."""

"""How the published LCKV models (Wu and Tu, ACL 2024) say which keys and values a layer reads: in fields
beside those of Llama, the map as a text under the key layer_types; and those of YOCO++, whose code is built
on theirs."""

import re
from collections.abc import Mapping
from typing import Any

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.reading import read

PUBLISHED_FIELDS = (
    "layer_types", "forward_passes", "backward_passes", "sliding_window", "force_nodiag", "method",
    "scaling_factor",
)  # fmt: skip
_WINDOW = 4096
"""What the published code assumes where a config gives no window."""


def compression_of(config: Mapping[str, Any]) -> CompressionConfig:
    """What makes the KV cache small, from the section `compression` of this project's configs, or from the
    fields of the published ones.

    Raises ModelError that names every field that is unknown or of another type,
    and fields of both kinds in one config.
    """
    given = {name: config[name] for name in PUBLISHED_FIELDS if config.get(name) is not None}
    if config.get("compression") is not None:
        if given:
            raise ModelError(
                f"{', '.join(given)} are given beside compression; the published LCKV models have only the "
                "former, and models of this version only the latter."
            )
        return CompressionConfig.from_dict(config["compression"])
    if isinstance(given.get("layer_types"), list):
        raise ModelError(
            f"layer_types is {given['layer_types']}; it must be the sharing map, such as 0_6_6_6_6_6_6_7. "
            "(Transformers' own field of this name, a list of attention kinds, has no meaning here: mark "
            "layers with a window by an 's' in the map.)"
        )
    method, factor = given.pop("method", "yoco"), given.pop("scaling_factor", None)
    if method == "yoco-plus":
        given["layer_types"] = _mixing(given.get("layer_types"))
        given |= {} if factor is None else {"mix_scaling_factor": factor}
    elif method != "yoco":  # which nothing is mixed in by
        raise ModelError(
            f"method is {method!r}; of the published ones yoco and yoco-plus are read: convert another model."
        )
    if "s" in str(given.get("layer_types")):
        given.setdefault("sliding_window", _WINDOW)
    else:
        given.pop("sliding_window", None)  # the published code writes it into every config
    return read(CompressionConfig, given)


def _mixing(layer_types: object) -> str:
    """The map of a YOCO++ model: every layer above the lowest that computes keys and values mixes in those of
    the lowest."""
    entries = layer_types.split("_") if isinstance(layer_types, str) else []
    sources = [re.sub(r"s$", "", entry) for entry in entries]
    if not entries or sources[0] != "0":
        raise ModelError(
            f"method is 'yoco-plus' and layer_types is {layer_types!r}; layer 0, whose keys and values are "
            "mixed in, must compute its own: the map must begin with 0."
        )
    owns = [index > 0 and source == str(index) for index, source in enumerate(sources)]
    return "_".join(
        entry.replace(source, f"{source}+0", 1) if own else entry
        for entry, source, own in zip(entries, sources, owns, strict=True)
    )

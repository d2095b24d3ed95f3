"""How the published LCKV models (Wu and Tu, ACL 2024) say which keys and values a layer reads: in fields
beside those of Llama, the map as a text under the key layer_types."""

from collections.abc import Mapping
from typing import Any

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.reading import read

PUBLISHED_FIELDS = ("layer_types", "forward_passes", "backward_passes", "sliding_window", "force_nodiag")
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
    if "s" in str(given.get("layer_types")):
        given.setdefault("sliding_window", _WINDOW)
    else:
        given.pop("sliding_window", None)  # the published code writes it into every config
    return read(CompressionConfig, given)

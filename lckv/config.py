"""What makes a model's KV cache small: the sharing map, its iteration plan, the window and the KV policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.reading import read
from lckv.sharing.layer_types import LayerTypes


def _policies() -> Mapping[str, type]:
    return {"dense": DenseConfig, "dmc": DMCConfig}


@dataclass(frozen=True)
class CompressionConfig:
    """Cross-layer KV sharing (which layer's keys and values a layer reads) and the KV policy (which tokens
    are kept)."""

    layer_types: str | None = None
    """Sharing map, one entry per layer joined by "_": the index of the layer whose keys and values it reads,
    with an optional "s" for a sliding window, such as 0_6_6_6_6_6_6_7 (LCKV), 0_0_2_2 (CLA) or 0s_1s_2s_3_3_3
    (YOCO). Default: every layer reads its own (a plain transformer)."""

    forward_passes: int = 7
    """m: passes without gradient over each cyclic group of layers, before those with gradient (LCKV, section
    3.2)."""

    backward_passes: int = 2
    """b: passes with gradient over each cyclic group of layers (LCKV, section 3.2)."""

    sliding_window: int | None = None
    """W: tokens that a layer marked "s" sees, its own included. Required iff the map marks a layer with
    "s"."""

    force_nodiag: bool = False
    """Hide the query's own position in every layer, not only in cyclic ones."""

    policy: DenseConfig | DMCConfig = field(default_factory=DenseConfig, metadata={"variants": _policies})
    """What is kept along the sequence."""

    @classmethod
    def from_dict(cls, content: object) -> "CompressionConfig":
        """From what `dataclasses.asdict` makes of one, or a JSON file holds, with defaults for what is
        missing.

        Raises ModelError that names every field that is unknown or of another type.
        """
        return read(cls, content, "compression")

    def map(self, num_layers: int) -> LayerTypes:
        """The parsed sharing map of a model with `num_layers` layers; raises ValueError where it does not
        fit."""
        return LayerTypes.parse(self.layer_types, num_layers)

    def windows(self, num_layers: int) -> dict[int, int]:
        """Layers whose keys and values only windowed layers read, with the window in tokens: what a cache may
        drop."""
        if self.sliding_window is None:
            return {}
        return dict.fromkeys(self.map(num_layers).windowed_kv_layers, self.sliding_window)

    def problems(self, num_layers: int) -> list[str]:
        """Everything that is wrong with these settings for a model of `num_layers` layers: field, value, way
        out."""
        found = self.policy.problems(self.sliding_window)
        for name, value, least in (
            ("forward_passes", self.forward_passes, 0),
            ("backward_passes", self.backward_passes, 1),
        ):
            if value < least:
                found.append(f"compression.{name} is {value}; it must be at least {least}.")
        try:
            layer_types = self.map(num_layers)
        except ValueError as error:
            return [*found, str(error)]
        if layer_types.any_sliding and self.sliding_window is None:
            found.append(
                f"compression.layer_types {layer_types} marks layers with 's' but compression.sliding_window "
                "is not set; "
                "give the window in tokens, or remove the 's'."
            )
        if self.sliding_window is not None and not layer_types.any_sliding:
            found.append(
                f"compression.sliding_window is {self.sliding_window} but no layer of {layer_types} is "
                "marked with 's'; "
                "mark the layers that shall have a window, or remove compression.sliding_window."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            found.append(f"compression.sliding_window is {self.sliding_window}; it must be at least 1 token.")
        return found

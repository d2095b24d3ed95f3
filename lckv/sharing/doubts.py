"""What in a sharing map is legal, costs more than it need, and is most likely a slip of the pen.

In every published map (LCKV; the sandwich, pizza and lasagna maps of Wu et al., 2025) the layers of a cyclic
group read one layer, their target, and the target reads its own keys and values. One wrong digit breaks this:
0_3_3_3_6_6_6_7 has two groups of three layers, 0_3_3_4_6_6_6_7 one of six, which runs again in every pass.
"""

from collections.abc import Iterator

from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import LayerGroup, layer_groups


def doubts(layer_types: LayerTypes) -> Iterator[str]:
    """A sentence for each cyclic group whose layers read each other without need: they read several layers
    above themselves, or keys and values of a layer that itself reads a layer above."""
    for group in layer_groups(layer_types):
        if not group.iterated:
            continue
        reasons = [*_reasons(layer_types, group)]
        if reasons:
            yield (
                f"layers {group.start} to {group.stop - 1} of {layer_types} run again in every pass, and "
                f"{'; '.join(reasons)}. If that is not meant, let all of them read one layer, and that its "
                "own keys and values."
            )


def _reasons(layer_types: LayerTypes, group: LayerGroup) -> Iterator[str]:
    layers = layer_types.layers[group.start : group.stop]
    targets = sorted({layer.source for layer in layers if layer.cyclic})
    if len(targets) > 1:
        yield f"read more than one layer above themselves ({', '.join(map(str, targets))})"
    for layer in layers:
        # Readers above the group count as well: they too read a layer that was not meant to be read.
        readers = [reader for reader in layer_types.readers(layer.index) if reader != layer.index]
        if layer.cyclic and readers:
            who = (
                f"layer {readers[0]} reads"
                if len(readers) == 1
                else f"layers {', '.join(map(str, readers))} read"
            )
            yield f"{who} layer {layer.index}, which itself reads layer {layer.source}"

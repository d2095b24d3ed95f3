"""Random sharing maps for property tests."""

from hypothesis import strategies as st

from lckv.sharing.layer_types import LayerTypes


def _layer_types(sources: list[int]) -> LayerTypes:
    return LayerTypes.parse("_".join(map(str, sources)), len(sources))


def sources(num_layers: int) -> st.SearchStrategy[list[int]]:
    """The layers that the layers of a map read."""
    return st.lists(st.integers(0, num_layers - 1), min_size=num_layers, max_size=num_layers)


def maps(most_layers: int = 20) -> st.SearchStrategy[LayerTypes]:
    """Maps of up to so many layers."""
    return st.integers(1, most_layers).flatmap(sources).map(_layer_types)

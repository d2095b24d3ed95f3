"""Random sharing maps for property tests."""

from hypothesis import strategies as st

from lckv.sharing.layer_types import LayerTypes


def _layer_types(sources: list[int], mixers: list[int] | None = None) -> LayerTypes:
    """With numbers in `mixers`, a layer that reads its own keys and values may mix in those of one below, and
    one that reads a layer below another one, too."""
    entries = [str(source) for source in sources]
    for layer, number in enumerate(mixers or ()):
        below = [owner for owner in sorted(set(sources)) if owner < layer and owner != sources[layer]]
        if sources[layer] > layer or not number % 3 or not below:
            continue
        other = below[number % len(below)]
        source = sources[layer]
        apart = source < layer and number % 2 == 1 and sources[source] == source  # not for this one alone
        entries[layer] += f"/{other}" if apart else f"+{other}"
    return LayerTypes.parse("_".join(entries), len(sources))


def sources(num_layers: int) -> st.SearchStrategy[list[int]]:
    """The layers that the layers of a map read."""
    return st.lists(st.integers(0, num_layers - 1), min_size=num_layers, max_size=num_layers)


def maps(most_layers: int = 20) -> st.SearchStrategy[LayerTypes]:
    """Maps of up to so many layers."""
    return st.integers(1, most_layers).flatmap(sources).map(_layer_types)


def mixing_maps(most_layers: int = 20) -> st.SearchStrategy[LayerTypes]:
    """Maps of up to so many layers, of which some mix keys and values of others into their own."""
    return st.integers(1, most_layers).flatmap(
        lambda layers: st.builds(
            _layer_types,
            sources(layers),
            st.lists(st.integers(0, 8), min_size=layers, max_size=layers),
        )
    )

"""Token by token, in pieces, and in parallel: the same numbers, for any map, shape and policy."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import close, model, tokens


@st.composite
def maps(draw: st.DrawFn) -> str:
    """Any map of up to four layers, a third of the layers with a window; layers may mix keys and values of
    layers below into their own."""
    layers = draw(st.integers(1, 4))
    sources = draw(st.lists(st.integers(0, layers - 1), min_size=layers, max_size=layers))
    windows = draw(st.lists(st.sampled_from(["", "", "s"]), min_size=layers, max_size=layers))
    entries = []
    for layer, (source, window) in enumerate(zip(sources, windows, strict=True)):
        lenders = [below for below in range(layer) if below in sources]
        mixes = source == layer and lenders and draw(st.booleans())
        entries.append(f"{source}{f'+{draw(st.sampled_from(lenders))}' if mixes else ''}{window}")
    return "_".join(entries)


@settings(max_examples=40)
@given(
    layer_types=maps(),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3)]),
    window=st.sampled_from([0, None, 1, 2, 12]),
    force_nodiag=st.booleans(),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    padding=st.integers(0, 2),
)
def test_pieces_equal_the_whole(layer_types, heads, window, force_nodiag, sizes, padding):
    """`window` is that of merging; 0: nothing is merged."""
    policy = DMCConfig(stage="finetune", initial_decision_bias=0.25, window=window) if window != 0 else None
    if policy is not None:
        layer_types = layer_types.replace("s", "")
    length = sum(sizes)
    one = model(
        layer_types, policy, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8,
        forward_passes=length, backward_passes=1, hidden_size=24, force_nodiag=force_nodiag,
    )  # fmt: skip
    ids = tokens(2, length, seed=length)
    ids[1, :padding] = 0
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : min(padding, length - 1)] = 0
    with torch.no_grad():
        whole = one(ids, attention_mask=mask, use_cache=False).logits
        for pieces in (sizes, [1] * length):
            cache, done, found = None, 0, []
            for size in pieces:
                part = slice(done, done + size)
                done += size
                output = one(
                    ids[:, part], attention_mask=mask[:, :done], past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                found.append(output.logits)
            counted = mask.bool()
            close(torch.cat(found, 1)[counted], whole[counted], 2e-4)

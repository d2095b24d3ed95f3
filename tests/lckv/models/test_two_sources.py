"""Layers that only read, and read two others: a learned mixture of both (`2+0`), or the keys of one and the
values of the other (`2/0`)."""

import pytest
import torch

from tests.lckv.models.tiny import TWO_SOURCES, close, model, tokens
from tests.lckv.models.token_by_token import TokenByToken

MAPS = (*TWO_SOURCES, "0_1+0_4_1+0_4_4/1", "0s_1s_1/0s_1+0s_4")


@pytest.mark.parametrize("layer_types", MAPS)
def test_formulas_at_once_in_pieces_and_token_by_token(layer_types: str) -> None:
    read, text = model(layer_types).double(), tokens(1, 11)
    expected = TokenByToken(read).logits(text[0].tolist())
    with torch.no_grad():
        close(read(text, use_cache=False).logits[0], expected, 3e-6)  # RoPE has float32 angles
        for sizes in ([1] * 11, [5, 4, 2]):
            cache, logits = None, []
            for piece in text.split(sizes, 1):
                output = read(piece, past_key_values=cache)
                cache = output.past_key_values
                logits.append(output.logits[0])
            close(torch.cat(logits), expected, 3e-6)
    assert cache is not None and set(cache.slots._layers) == set(read.model.layer_types.kv_layers)

"""Pages of dropped tokens go back to the pool."""

import torch

from tests.lckv.cache.models import logits, paged_cache, text
from tests.lckv.policies.cases import fresh_model


def test_a_head_that_drops_everything_keeps_the_pages_of_its_window() -> None:
    built = fresh_model("dms-1", "plain")
    for layer in built.model.layers:  # every logit is above 0
        object.__setattr__(layer.self_attn.policy.config, "initial_decision_offset", -1e6)
    cache, tokens = paged_cache(built), text(40)
    sequence, window = cache.open(), 4
    view, free = cache.rows([sequence]), []
    for token in tokens:
        logits(built, [[token]], view)
        free.append(cache.pages_free)
    lengths = torch.stack([cache.lengths(sequence, layer) for layer in range(3)])
    assert (lengths == window + 1).all()
    used = [cache.pages - number for number in free]
    assert used[-1] == 3 * 2 * 2, "of 3 layers and 2 heads 5 slots each, in pages of 4"
    assert max(used) == used[-1]
    prefilled = paged_cache(built)
    again = prefilled.open()
    logits(built, [tokens], prefilled.rows([again]))
    assert prefilled.pages - prefilled.pages_free == used[-1]

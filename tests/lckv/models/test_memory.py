"""What a forward pass keeps in memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, SHARED, WINDOWS, model, tokens


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        ]
        self.entries = max([self.entries, *sizes])
        return result


@pytest.mark.parametrize(
    ("layer_types", "policy"),
    [
        (PLAIN, None),
        (CYCLIC, None),
        (WINDOWS, None),
        (SHARED, MERGING),
        (SHARED, DMCConfig(stage="finetune")),
    ],
)
def test_nothing_grows_with_the_square_of_the_length(
    layer_types: str | None, policy: DMCConfig | None
) -> None:
    sizes = {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 8,
        "forward_passes": 1,
        "backward_passes": 1,
    }
    one, length = model(layer_types, policy, **sizes), 2048
    ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.int64)
    mask[0, :300] = 0
    with torch.no_grad(), Largest() as largest:
        one.train()(ids, attention_mask=mask)
        cache = one.eval()(ids[:, :1024], attention_mask=mask[:, :1024], logits_to_keep=1).past_key_values
        one(ids[:, 1024:], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert largest.entries <= 128 * length < length**2 // 8  # scores of a block of queries


@pytest.mark.parametrize("use_cache", [False, True])
def test_hidden_states_and_keys_are_dropped_as_soon_as_nobody_needs_them(use_cache: bool) -> None:
    one = model(SHARED)
    states: list[weakref.ref] = []
    keys: dict[int, weakref.ref] = {}
    alive: list[list[bool]] = []

    def remember(index: int):  # type: ignore[no-untyped-def]
        def hook(_: Any, __: Any, result: tuple) -> None:
            states.append(weakref.ref(result[0]))
            if result[1] is not None:
                keys[index] = weakref.ref(result[1])

        return hook

    for index, layer in enumerate(one.model.layers):
        layer.register_forward_hook(remember(index))
    one.model.norm.register_forward_pre_hook(
        lambda *_: alive.append([each() is not None for each in (*states, *keys.values())])
    )
    with torch.no_grad():
        one(tokens(1, 4), use_cache=use_cache)
    assert alive == [
        [False, False, False, True, use_cache, use_cache]
    ]  # keys and values are committed after the last layer

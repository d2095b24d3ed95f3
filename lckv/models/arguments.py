"""The arguments of a forward pass beside tokens, mask, positions and cache: each is read or refused."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lckv.models.cache import CACHE_NAME
from lckv.models.packing import Packing

OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of transformers' loss function."""

_REFUSED = {
    "output_attentions": (
        (None, False),
        "attention weights are never in memory as a whole here; leave it out",
    ),
    "output_router_logits": ((None, False), "this model has no experts; leave it out"),
    "is_causal": (
        (None, True),
        "the sharing map says what a query sees, and it is always causal; leave it out",
    ),
}
"""By name: values that say nothing else than what is done anyway, and what is wrong with all others."""

_PACKING = tuple(Packing.__dataclass_fields__)


class Asked(NamedTuple):
    """What further arguments ask for."""

    return_dict: bool
    packing: Packing
    cache_position: Tensor | None
    of_attention: Mapping[str, Any]
    """Arguments of the attention function."""


def read_arguments(given: Mapping[str, Any], config: Any, *, attention_function: str | None) -> Asked:
    """Sort the arguments `given` by name; those that are not given are the configuration's.
    `attention_function`: a function of transformers' attention interface, which takes all names that the
    model does not know; None: there is none.

    Raises ValueError for a value that cannot be served and TypeError for an unknown name."""
    rest = dict(given)
    for name, (served, obstacle) in _REFUSED.items():
        value = rest.pop(name, None)
        if value is None:
            value = getattr(config, name, None)
        if value not in served:
            raise ValueError(f"{name} is {value}: {obstacle}.")
    return_dict = rest.pop("return_dict", None)
    rest.pop(
        "num_items_in_batch", None
    )  # of the loss, which is the mean of nothing where there are no labels
    packing = Packing(**{name: rest.pop(name, None) for name in _PACKING})
    cache_position = rest.pop("cache_position", None)
    if rest and attention_function is None:
        name, value = next(iter(rest.items()))
        raise TypeError(
            f"forward got the argument {name} = {_shown(value)}, which this model does not read; leave it "
            f"out, or correct its name: it reads {', '.join(_names())}."
        )
    return Asked(config.return_dict if return_dict is None else return_dict, packing, cache_position, rest)


def check_cache_position(cache_position: Tensor | None, older: int, tokens: int) -> None:
    """Raises ValueError unless `cache_position` (int64 [tokens]; None: not given) counts on from `older`."""
    if cache_position is None or torch.compiler.is_compiling():
        return
    expected = torch.arange(older, older + tokens, device=cache_position.device)
    if cache_position.shape != expected.shape or bool((cache_position != expected).any()):
        raise ValueError(
            f"cache_position is {_shown(cache_position)}; behind {older} columns in {CACHE_NAME} the "
            f"{tokens} new ones are {older} .. {older + tokens - 1}: leave it out."
        )


def check_tokens(input_ids: Tensor | None) -> Tensor:
    """`input_ids`. Raises ValueError unless they are int [b, s]."""
    assert input_ids is not None
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is a tensor {list(input_ids.shape)} of {input_ids.dtype}; it must be int [batch, "
            "tokens] (one row: input_ids[None])."
        )
    return input_ids


def check_embedded(embedded: Tensor, hidden_size: int) -> None:
    """Raises ValueError unless tokens are embedded as [b, s, hidden]."""
    if embedded.dim() != 3 or embedded.shape[2] != hidden_size:
        raise ValueError(
            f"inputs_embeds has shape {list(embedded.shape)}; it must be [batch, tokens, {hidden_size}]."
        )


def chosen_states(output_hidden_states: Any, count: int) -> frozenset[int]:
    """Which of `count` hidden states are wanted: all for True, none for False and None, those at an index or
    a list of them, from the end where they are negative.

    Raises ValueError for an index that there is not."""
    if output_hidden_states is None or isinstance(output_hidden_states, bool):
        return frozenset(range(count) if output_hidden_states else ())
    wanted = [output_hidden_states] if isinstance(output_hidden_states, int) else [*output_hidden_states]
    for index in wanted:
        if not -count <= index < count:
            raise ValueError(
                f"output_hidden_states is {output_hidden_states}; there are {count} hidden states, "
                f"0 .. {count - 1}."
            )
    return frozenset(index % count for index in wanted)


def _names() -> Iterator[str]:
    yield from ("input_ids", "attention_mask", "position_ids", CACHE_NAME, "inputs_embeds")
    yield from ("labels (with a head)", "use_cache", "logits_to_keep (with a head)", "output_hidden_states")
    yield from ("states_to_keep (without a head)", "return_dict", "cache_position")
    yield from (*OF_LOSS, *_PACKING, *_REFUSED)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 8:
        return f"a tensor of shape {list(value.shape)}"
    return repr(value.tolist() if isinstance(value, Tensor) else value)

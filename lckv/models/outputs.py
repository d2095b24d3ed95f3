"""What the models return.

Shapes: b rows, s new tokens, g KV heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class RunOutput(NamedTuple):
    """What running the layers gives; fields as in `LCKVModelOutput`."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor | None, ...] | None
    auxiliary_loss: Tensor | None
    statistics: dict[str, Tensor] | None

    passes: int
    """That were run over the iterated groups of layers."""


@dataclass
class LCKVModelOutput(BaseModelOutputWithPast):
    """What the decoder returns: transformers' fields and two more. Those that were not asked for are None.

    `last_hidden_state` [b, s, hidden] is normalised. `cache` is an `LCKVCache` (`past_key_values` before
    transformers 5.24). `hidden_states`: [b, s, hidden] of the embedding, of every layer in the pass that
    counts, the last one normalised; None in the place of one that was not asked for. `attentions` is None:
    attention weights are not in memory as a whole."""

    hidden_states: tuple[Tensor | None, ...] | None = None  # type: ignore[assignment]  # keeps its place
    auxiliary_loss: Tensor | None = None
    """float32 []: the KV policy's, or that of errors between passes (`lckv.pass_errors`), mean over the rows
    that have tokens."""
    statistics: dict[str, Tensor] | None = None
    """What the KV policy reports, by name: each float32 [layers that compute keys and values, b, g]; or
    errors between passes, of layers that a layer below them reads. None where there is nothing to report, and
    with a cache."""


@dataclass
class LCKVOutput(CausalLMOutputWithPast):
    """What the language model returns: transformers' fields, and those of `LCKVModelOutput`.

    `loss` float32 []: mean cross-entropy of the shifted labels in nats; in training with a policy that has
    one, plus `auxiliary_loss`. `logits` [b, s, vocabulary]; None where they were to be skipped."""

    hidden_states: tuple[Tensor | None, ...] | None = None  # type: ignore[assignment]
    auxiliary_loss: Tensor | None = None
    statistics: dict[str, Tensor] | None = None

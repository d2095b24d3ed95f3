"""The layers of an LCKV model as the plan of a sharing map calls them, for one forward pass."""

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from lckv.models.layers import LCKVLlamaDecoderLayer, Tokens
from lckv.pass_errors import PassRecord
from lckv.policies.base import Extension, Statistics
from lckv.sharing.execution import Two


class HiddenStates:
    """Of the embedding and of every layer, where they are wanted."""

    def __init__(self, wanted: Collection[int], embedded: Tensor) -> None:
        self._wanted = wanted
        self._states: list[Tensor | None] = []
        self.add(embedded)

    def add(self, hidden_states: Tensor) -> None:
        """Those of the next layer."""
        self._states.append(hidden_states if len(self._states) in self._wanted else None)

    def all(self, last: Tensor) -> tuple[Tensor | None, ...]:
        """All that were added, `last` in the place of the last ones; None where they are not wanted."""
        return (*self._states[:-1], last if len(self._states) - 1 in self._wanted else None)


class PlannedLayers:
    """The model's layers for one forward pass, as the plan calls them."""

    def __init__(
        self,
        layers: Sequence[LCKVLlamaDecoderLayer],
        tokens: Tokens,
        hidden_states: HiddenStates,
        record: PassRecord,
    ) -> None:
        """Each layer's result in the pass that counts is added to `hidden_states`; keys and values of passes
        are compared in `record`."""
        self._layers, self._tokens, self._hidden_states = layers, tokens, hidden_states
        self._record = record
        self.kept: dict[int, Extension] = {}
        """Keys and values of the pass that counts, if there is a cache for them."""
        self.statistics: dict[int, Statistics] = {}
        self._lent: dict[int, Extension] = {}

    def run(
        self, index: int, hidden_states: Tensor, source: Extension | Two[Extension] | None, *, kept: bool
    ) -> tuple[Tensor, Extension | None]:
        """The whole layer, recomputed in backward where gradient checkpointing is on."""
        hidden_states, own, statistics = self._call(index, hidden_states, "all", *_fields(source))
        if kept:
            self._hidden_states.add(hidden_states)
            self._keep(index, own, statistics or self._errors(index, own))
        elif own is not None:
            self._record.passed(index, own[:2])
        return hidden_states, own

    def run_wanted(
        self, index: int, hidden_states: Tensor, source: Extension | Two[Extension] | None
    ) -> tuple[Tensor, Extension | None]:
        """See `WantingLayers`."""
        hidden_states, own, statistics = self._call(index, hidden_states, "wanted", *_fields(source))
        self._keep(index, own, statistics or self._errors(index, own))
        return hidden_states, own

    def keys_values(self, index: int, hidden_states: Tensor) -> Extension:
        """The layer's keys and values alone."""
        return self._keys_values(index, hidden_states)

    def mixed_keys_values(self, index: int, hidden_states: Tensor, lent: Extension) -> Extension:
        """The same of a layer that mixes."""
        return self._keys_values(index, hidden_states, *lent)

    def lent(self, index: int) -> Extension:
        """See `MixingLayers`."""
        return self._lent.pop(index)

    def _keys_values(self, index: int, hidden_states: Tensor, *lent: Tensor | None) -> Extension:
        _, own, statistics = self._call(index, hidden_states, "keys_values", *lent)
        assert own is not None
        self._keep(index, own, statistics)  # those of the last pass, which is the one that counts, stay
        self._record.passed(index, own[:2])
        return own

    def first_guess(self, source: int, hidden_states: Tensor) -> Extension:
        """What is guessed of the keys and values of layer `source`, for the first pass to read."""
        guess = self._call(source, hidden_states, "first_guess")[1]
        assert guess is not None
        return Extension(*self._record.guessed(source, guess[:2]))

    def _call(
        self, index: int, hidden_states: Tensor, part: str, *source: Tensor | None
    ) -> tuple[Tensor, Extension | None, Statistics]:
        """Of a part of the layer: hidden states, its keys and values, and their statistics. What it lends is
        kept for `lent`."""
        flat = self._layers[index](hidden_states, self._tokens, part, *source)
        if isinstance(flat, Tensor):  # of a layer that lies on another stage of somebody's pipeline
            return flat, None, ()
        hidden_states, key, value, hides, state, lent_key, lent_value, *statistics = flat
        own = None if key is None or value is None else Extension(key, value, hides, state)
        if lent_key is not None:
            self._lent[index] = Extension(lent_key, lent_value)
        return hidden_states, own, tuple(tensor for tensor in statistics if tensor is not None)

    def _keep(self, index: int, own: Extension | None, statistics: Statistics) -> None:
        if own is not None and self._tokens.cache is not None:
            self.kept[index] = own
        if statistics:
            self.statistics[index] = statistics

    def _errors(self, index: int, own: Extension | None) -> Statistics:
        """Of passes before the one that counts, where there is no cache."""
        if own is None or self._tokens.cache is not None:
            return ()
        counted = self._tokens.layout.counted
        return self._record.statistics(index, own[:2], None if counted is None else counted.transpose(0, 1))

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, Extension | None]:
        """Without older tokens attention to zero keys and values is exactly 0;
        with some, the zeros are among them."""
        if self._tokens.past is not None:
            return self.run(index, hidden_states, self.zeros(hidden_states), kept=False)
        return self._call(index, hidden_states, "without_source")[:2]

    def zeros(self, hidden_states: Tensor) -> Extension:
        """Keys and values before the first pass."""
        attention = self._layers[0].self_attn
        rows, tokens = hidden_states.shape[:2]
        key_bias, shape = attention.policy.traits.key_bias, (tokens, rows, attention.kv_heads)
        extra = 0 if key_bias is None else key_bias.extra_channels
        return Extension(
            hidden_states.new_zeros(*shape, attention.head_dim + extra),
            hidden_states.new_zeros(*shape, attention.head_dim),
        )


def _fields(source: Extension | Two[Extension] | None) -> Iterable[Tensor | None]:
    """As layers are given them."""
    if isinstance(source, Two):
        return *source.first, *source.second
    return source or ()

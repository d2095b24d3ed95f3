"""A layer as the parts of a tape (`megatron_ext.offload.tape`):

    before attention    norm, projections, query and key norms, RoPE      token-wise
    KV policy           where it looks at other tokens                    whole
    attention                                                             whole
    after attention     output projection, residuals, norm, MLP           token-wise

Keys and values that other layers read stay on the device, once for all readers: whoever reads them next needs
them there. Those that only their own layer reads go where the queries go.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lckv.policies.base import KeyValue, TokenContext
from lckv.rope import Turn
from megatron_ext.model.contexts import LayerContext, Own, Source, tensors_of_source
from megatron_ext.model.layer import LayerOutput, SharedKVLayer
from megatron_ext.model.transformer_config import SharedKVTransformerConfig
from megatron_ext.offload.host_pool import HostPool, require_host_memory
from megatron_ext.offload.share import OffloadSettings
from megatron_ext.offload.tape import Storage, Tape
from megatron_ext.offload.tokens import Tokens
from megatron_ext.offload.transfer import Buffers, Link


class OffloadedLayers:
    """Runs the layers of a pipeline stage so that their activations go to the host."""

    def __init__(
        self, config: SharedKVTransformerConfig, settings: OffloadSettings, device: torch.device
    ) -> None:
        self._shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._settings, self._device = settings, device
        self._read_by_others = config.compression.family(config.num_layers).shared_layers
        require_host_memory(settings.expected_bytes)
        link = Link(device)
        pool = HostPool(settings.host_bytes, pinned=device.type == "cuda")
        self.storage = Storage(pool, link, Buffers(device, link))
        self._last: weakref.ref[Tape] | None = None

    @property
    def share(self) -> float:
        """Of the tokens: those whose activations go to the host, 0 .. 1."""
        return self._settings.share

    def begin(self) -> None:
        """Another micro-batch, or another visit of one: no layer lies below the next one."""
        self._last = None
        self.storage.buffers.release()

    def run(
        self, layer: SharedKVLayer, hidden_states: Tensor, source: Source | None, context: LayerContext
    ) -> LayerOutput:
        """As the layer itself."""
        attention = layer.self_attention
        attention.require_source(source)
        with self._tape(layer, hidden_states, context) as tape:
            tape.keep(*tensors_of_source(source))
            with tape.whole():
                lent, key_value = attention.parted(attention.joined(source))
            query, *heads = self._token_wise(tape, _attending(layer), hidden_states, context, lent)
            own = self._own(tape, layer, heads, context) if heads else None
            if key_value is None:
                assert own is not None
                key_value = own.key_value
            with tape.whole():
                attended = attention.attend(query, key_value, context.tokens.documents)
            output = tape.token_wise(
                lambda *inputs: (layer.after_attention(*inputs),), attended, hidden_states
            )
        return LayerOutput.of(output[0], own)

    def keys_values(
        self,
        layer: SharedKVLayer,
        hidden_states: Tensor,
        context: LayerContext,
        lent: KeyValue | None = None,
    ) -> Own:
        """As the layer's."""
        with self._tape(layer, hidden_states, context) as tape:
            heads = self._token_wise(tape, _keys_values(layer), hidden_states, context, lent)
            return self._own(tape, layer, heads, context)

    def feed_forward(self, layer: SharedKVLayer, hidden_states: Tensor) -> Tensor:
        """As the layer's."""
        with self._tape(layer, hidden_states, None) as tape:
            return tape.token_wise(lambda states: (layer.feed_forward(states),), hidden_states)[0]

    def _tape(self, layer: SharedKVLayer, hidden_states: Tensor, context: LayerContext | None) -> Tape:
        tokens = Tokens.of(hidden_states, shards=self._shards, share=self._settings.share)
        before = None if self._last is None else self._last()
        tape = Tape(self.storage, tokens, [*layer.parameters(), *_tensors_of(context)], before)
        self._last = weakref.ref(tape)
        return tape

    @staticmethod
    def _token_wise(
        tape: Tape,
        part: Callable[..., tuple[Tensor, ...]],
        hidden_states: Tensor,
        context: LayerContext,
        lent: KeyValue | None,
    ) -> tuple[Tensor, ...]:
        """`part` of a layer, a function of its input, of the context, in which tokens have places, and of
        what a layer that mixes mixes in."""
        tokens = tape.tokens
        tape.keep(*(lent or ()))
        return tape.token_wise(
            lambda states, *other: part(states, context.tokens, other),
            hidden_states,
            *(lent or ()),
            # cut in backward: with several shards what is cut is a copy, which each layer would keep
            again=lambda states, *other: part(states, context.tokens.at(tokens.tail), other),
        )

    def _own(self, tape: Tape, layer: SharedKVLayer, heads: Sequence[Tensor], context: LayerContext) -> Own:
        """The layer's keys and values and its policy's statistics, from what the token-wise part returned."""
        attention, lends = layer.self_attention, None
        if attention.lends:
            *heads, key, value = heads
            lends = KeyValue(key, value)
            tape.keep(*lends)
        with tape.whole():
            if attention.policy.token_wise:
                own, statistics = attention.context_group.kept(KeyValue(*heads)), ()
            else:
                *read, key, value = heads
                own, statistics = attention.of_policy(read[0] if read else None, key, value, context)
        if layer.layer_number - 1 in self._read_by_others:
            tape.keep(*own)
        elif attention.core_attention.sight.window is None:  # with one, chunks see little of whole rows
            tape.expect(*own)
        return Own(own, statistics, lends)


def _attending(layer: SharedKVLayer) -> Callable[..., tuple[Tensor, ...]]:
    """The part before attention: queries that attend, and of a layer that computes them what its KV policy
    reads besides, if anything, and keys and values, or what it makes of these; then what the layer lends."""
    attention = layer.self_attention

    def part(hidden_states: Tensor, tokens: TokenContext, lent: Sequence[Tensor]) -> tuple[Tensor, ...]:
        heads = attention.heads(layer.input_layernorm(hidden_states), _pair(lent))
        query = attention.attending(heads[0], tokens)
        return (query,) if len(heads) == 1 else (query, *_finished(layer, hidden_states, heads, tokens))

    return part


def _keys_values(layer: SharedKVLayer) -> Callable[..., tuple[Tensor, ...]]:
    """The part before attention without queries."""

    def part(hidden_states: Tensor, tokens: TokenContext, lent: Sequence[Tensor]) -> tuple[Tensor, ...]:
        heads = layer.self_attention.kv_heads(layer.input_layernorm(hidden_states), _pair(lent))
        return _finished(layer, hidden_states, heads, tokens)

    return part


def _finished(
    layer: SharedKVLayer, hidden_states: Tensor, heads: Sequence[Tensor], tokens: TokenContext
) -> tuple[Tensor, ...]:
    """What the KV policy reads, of the layer's input or its queries, if anything, and keys and values; or
    those that a token-wise policy makes of them; then what the layer lends."""
    attention = layer.self_attention
    *query, key, value = heads
    lends = (key, value) if attention.lends else ()
    read = attention.read(query[0] if query else None, attention.projected(hidden_states))
    if not attention.policy.token_wise:
        return *(() if read is None else (read,)), key, value, *lends
    return *attention.policy.keys_values(key, value, read, tokens)[0], *lends


def _pair(tensors: Sequence[Tensor]) -> KeyValue | None:
    return KeyValue(*tensors) if tensors else None


def _tensors_of(context: LayerContext | None) -> Iterator[Tensor]:
    """What all layers have of a context."""
    for tokens in () if context is None else (context.tokens, context.chunks):
        if tokens is None:
            continue
        assert isinstance(tokens.rotate, Turn)
        yield from tokens.rotate.angles
        for tensor in (tokens.counted, tokens.noise, tokens.positions):
            if tensor is not None:
                yield tensor

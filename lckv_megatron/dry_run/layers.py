"""When each run of a layer goes forward and backward, in events of the recorder.

A layer runs whole, its keys and values alone, or its MLP alone. Its forward is a call. Its backward begins
when the gradient of its first output is there, and ends when that of its input is: hooks of both tensors
tell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lckv_megatron.dry_run.recorder import Recorder
from lckv_megatron.dry_run.replacements import Replacement
from lckv_megatron.memory_plan.trace import Stretch
from megatron_ext.model.layer import LayerOutput, SharedKVLayer
from megatron_ext.model.offloaded import OffloadedLayers

_PARTS = {"forward": "layer", "keys_values": "keys and values", "feed_forward": "MLP"}
"""Methods of a layer, each of which is a run, and how they are told."""
_OFFLOADED = {"run": "layer", "keys_values": "keys and values", "feed_forward": "MLP"}
"""The same of what runs layers whose activations go to the host; the layer is the first argument."""


@dataclass(slots=True)
class _Run:
    """Events of one run of a layer."""

    name: str
    layer: int
    forward: tuple[int, int]
    backward_start: int | None = None
    backward_end: int | None = None


@dataclass
class LayerRuns:
    """Notes the runs of layers while its replacements are there."""

    recorder: Recorder
    _runs: list[_Run] = field(default_factory=list)
    _inside: bool = False

    def replacements(self) -> Iterator[Replacement]:
        """Of the methods of layers."""
        for owner, parts in ((SharedKVLayer, _PARTS), (OffloadedLayers, _OFFLOADED)):
            for part, name in parts.items():
                yield Replacement(owner, part, self._noting(name, getattr(owner, part)))

    def stretches(self) -> Iterator[Stretch]:
        """Forwards and backwards of all runs so far."""
        for number, run in enumerate(self._runs):
            name = run.name if run.backward_end is not None else f"{run.name} without gradient"
            yield Stretch(name, run.layer, number, "forward", *run.forward)
            if run.backward_start is not None and run.backward_end is not None:
                yield Stretch(name, run.layer, number, "backward", run.backward_start, run.backward_end)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._inside or self.recorder.is_again:  # a whole layer runs its MLP
                return function(*args, **options)
            layer, hidden_states = args[:2] if isinstance(args[0], SharedKVLayer) else args[1:3]
            start = self.recorder.now
            self._inside = True
            try:
                output = function(*args, **options)
            finally:
                self._inside = False
            run = _Run(name, layer.layer_number, (start, self.recorder.now))
            self._runs.append(run)
            first = _first(output)
            if torch.is_grad_enabled() and first.requires_grad and hidden_states.requires_grad:
                self._note_backward(run, first, hidden_states)
            return output

        return call

    def _note_backward(self, run: _Run, output: Tensor, hidden_states: Tensor) -> None:
        def begin(_: Tensor) -> None:
            run.backward_start = self.recorder.now

        def end(_: Tensor) -> None:
            run.backward_end = self.recorder.now

        output.register_hook(begin)
        hidden_states.register_hook(end)


def _first(output: Any) -> Tensor:
    """The output whose gradient comes last: hidden states, else keys."""
    if isinstance(output, LayerOutput):
        return output.hidden_states
    return output if isinstance(output, Tensor) else output[0].key

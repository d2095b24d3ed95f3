"""Activations that go to the host's memory: `megatron_ext.offload` as it is, on a pool and on copies that are
only noted.

Copies go one after the other, beside the computation, as on the stream of a GPU: one begins when it is asked
for and those before it are done, and takes as long as `train.offload_gigabytes_per_second` says. Where the
computation waits for one, the record says how long.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lckv_megatron.dry_run.recorder import Recorder
from lckv_megatron.dry_run.replacements import Replacement
from megatron_ext.config import TrainConfig
from megatron_ext.model import offloaded, transformer_config
from megatron_ext.offload.host_pool import HostPool
from megatron_ext.offload.tape import Tape
from megatron_ext.offload.transfer import Link


@dataclass(frozen=True)
class HostUse:
    """What activations take of the host on one rank."""

    share: float
    """Of the tokens, 0 .. 1."""
    pool_bytes: int
    """Of the pool, as it has grown."""
    to_host: float
    """Bytes that a step copies there."""
    from_host: float
    """Bytes that a step copies back."""
    seconds: float
    """Of these copies."""
    waited_seconds: float
    """That the computation waits for them in a step: copies that are not hidden."""
    again_flops: float
    """Of what a step computes again."""


def pretended_host(recorder: Recorder, train: TrainConfig, peak_tflops: float) -> Iterator[Replacement]:
    """For a GPU of that peak, whatever memory this machine has."""
    rate = train.offload_gigabytes_per_second * 1e9
    yield Replacement(offloaded, "Link", lambda device: PretendedLink(recorder, rate))
    yield Replacement(offloaded, "HostPool", partial(PretendedPool, recorder))
    yield Replacement(offloaded, "require_host_memory", lambda expected_bytes: None)
    yield Replacement(transformer_config, "device_peak_tflops", lambda precision: peak_tflops)


def computing_again(recorder: Recorder) -> Replacement:
    """The record then knows what is computed again."""
    return Replacement(Tape, "compute_again", _again(recorder, Tape.compute_again))


def _again(recorder: Recorder, function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        with recorder.computing_again():
            function(*args)

    return call


class PretendedPool(HostPool):
    """The pool of pinned memory, which no device holds."""

    def __init__(self, recorder: Recorder, limit: int, *, pinned: bool) -> None:
        super().__init__(limit, pinned=True)
        self._recorder = recorder

    def _memory(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        self._recorder.put_on_host(memory)
        return memory


class PretendedLink(Link):
    """Copies that are noted; moments are seconds of the record."""

    def __init__(self, recorder: Recorder, rate: float) -> None:
        """`rate`: bytes per second."""
        super().__init__(torch.device("cpu"))
        self._recorder, self._rate, self._free_from = recorder, rate, 0.0

    def copy(self, target: Tensor, source: Tensor) -> None:
        number = source.numel() * source.element_size()
        work, begin = self._recorder.current, max(self._free_from, self._recorder.now_seconds)
        if self._recorder.is_on_host(target):
            work.to_host_bytes += number
        else:
            work.from_host_bytes += number
        self._free_from = begin + number / self._rate

    def mark(self) -> float:
        return self._free_from

    def wait(self, mark: float | None) -> None:
        if mark is not None:
            self._recorder.wait_until(mark)

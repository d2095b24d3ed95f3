"""The order of copies and waits, on streams that only write down what they are asked for."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from megatron_ext.offload.transfer import Buffers, Link


class _Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class _Tensor:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def copy_(self, _: object, non_blocking: bool = False) -> None:
        self.log.append(f"copy {'beside' if non_blocking else 'at once'}")


class _Layer:
    """Activations of a layer."""

    device_bytes = 64

    def __init__(self, below: "_Layer | None" = None) -> None:
        self.below, self.loads = below, 0

    def load(self, memory: torch.Tensor, link: Link) -> None:
        self.loads += 1

    def evicted(self) -> None:
        pass

    def before(self) -> "_Layer | None":
        return self.below


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    compute = _Stream("compute", lines)

    @contextmanager
    def on(stream: _Stream):  # type: ignore[no-untyped-def]
        lines.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: _Stream("copies", lines))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return lines


def test_a_copy_waits_for_what_was_computed_and_nobody_waits_for_it(log: list[str]) -> None:
    link = Link(torch.device("cuda"))
    link.copy(_Tensor(log), object())  # type: ignore[arg-type]
    assert log == ["copies waits for compute", "on copies", "copy beside"]


def test_computation_waits_where_more_than_one_layer_is_on_its_way(log: list[str]) -> None:
    link = Link(torch.device("cuda"))
    for _ in range(3):
        link.release([])
    assert log == ["compute waits for event 1", "compute waits for event 2"]


def test_backward_begins_when_the_last_layer_has_left(log: list[str]) -> None:
    link = Link(torch.device("cuda"))
    leaving = _Layer()
    left = weakref.ref(leaving)
    link.release([leaving])
    del leaving
    assert left() is not None
    link.settle()
    assert (left(), log) == (None, ["compute waits for event 1"])


def test_buffers_give_back_the_memory_of_layers_that_are_gone() -> None:
    device = torch.device("cpu")
    buffers = Buffers(device, Link(device))
    below = _Layer()
    above = _Layer(below)
    buffers.memory_of(above)
    assert buffers.device_bytes == 2 * _Layer.device_bytes
    buffers.release()
    assert buffers.device_bytes == 2 * _Layer.device_bytes  # both will be needed
    del above
    buffers.release()
    assert buffers.device_bytes == _Layer.device_bytes
    memory = buffers.memory_of(below)
    assert below.loads == 1 and len(memory) == _Layer.device_bytes


def test_what_was_fetched_is_waited_for(log: list[str]) -> None:
    link = Link(torch.device("cuda"))
    link.wait(link.mark())
    assert log == ["compute waits for event 1"]


def test_on_a_cpu_copies_are_plain(log: list[str]) -> None:
    link = Link(torch.device("cpu"))
    link.copy(_Tensor(log), object())  # type: ignore[arg-type]
    link.release([])
    link.wait(link.mark())
    assert log == ["copy at once"]

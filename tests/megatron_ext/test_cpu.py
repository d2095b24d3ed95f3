"""Each bridge does on CPU what megatron-core asks of CUDA."""

import subprocess
import sys

import pytest
import torch

from megatron_ext import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bridges exist only where there is no CUDA")


@pytest.fixture(autouse=True)
def installed() -> None:
    cpu.install()


def test_every_bridge_is_installed() -> None:
    assert all(bridge.installed for bridge in cpu.bridges())


def test_installing_twice_changes_nothing() -> None:
    before = [getattr(bridge.owner, bridge.name) for bridge in cpu.bridges()]
    cpu.install()
    assert before == [getattr(bridge.owner, bridge.name) for bridge in cpu.bridges()]


def test_importing_patches_nothing() -> None:
    code = (
        "import torch; before = torch.zeros, torch.cuda.current_device, torch.Tensor.cuda; import "
        "megatron_ext.cpu;"
        "assert before == (torch.zeros, torch.cuda.current_device, torch.Tensor.cuda)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_patched_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "bridges", lambda: pytest.fail("asked for bridges"))
    cpu.install()


@pytest.mark.parametrize("name", ["current_device", "set_device", "synchronize", "empty_cache"])
def test_device_calls(name: str) -> None:
    result = getattr(torch.cuda, name)(*([0] if name == "set_device" else []))
    assert result == (torch.device("cpu") if name == "current_device" else None)


def test_what_is_put_on_a_stream_is_done_at_once() -> None:
    stream = torch.cuda.Stream(device=torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ones = torch.ones(3)
    stream.record_event().wait(torch.cuda.default_stream())
    stream.synchronize()
    assert ones.sum() == 3


def test_random_states() -> None:
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    for restore in (torch.cuda.set_rng_state, random._set_cuda_rng_state):
        restore(state)
        assert torch.equal(torch.rand(3), drawn)
    restore(state)
    assert torch.equal(random._get_cuda_rng_state(), torch.get_rng_state())


def test_tracked_regions_have_their_own_randomness(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("region", 11)
    before = torch.get_rng_state()
    with tracker.fork("region"):
        first = torch.rand(4)
    with tracker.fork("region"):
        second = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert "CPU RNG state changed" not in caplog.text


def test_ranges_for_profilers() -> None:
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()


def test_tensors_stay_where_they_are() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "torch.cuda.FloatTensor"), (torch.bfloat16, "torch.cuda.BFloat16Tensor")],
)
def test_types_are_named_as_the_optimizers_expect(dtype: torch.dtype, name: str) -> None:
    tensor = torch.zeros(1, dtype=dtype)
    assert tensor.type() == name
    assert tensor.type(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", cpu._FACTORIES)
def test_factories_make_cpu_tensors(name: str) -> None:
    arguments = {
        "tensor": ([1.0],),
        "full": ((2,), 1.0),
        "arange": (3,),
        "zeros_like": (torch.ones(2),),
        "ones_like": (torch.ones(2),),
        "empty_like": (torch.ones(2),),
    }.get(name, (2,))
    for device in ("cuda", torch.device("cuda", 0), None):
        assert getattr(torch, name)(*arguments, device=device, pin_memory=True).device.type == "cpu"
    assert getattr(torch, name)(*arguments, device="meta").device.type == "meta"


def test_a_device_context_still_reaches_the_factories() -> None:
    """transformers builds models within `torch.device("meta")` and trusts it."""
    code = (
        "import torch; from megatron_ext import cpu; cpu.install()\n"
        "with torch.device('meta'):\n"
        "    made = [torch.zeros(2), torch.empty(2), torch.arange(2), torch.ones(2), torch.full((2,), 1.0)]\n"
        "assert {tensor.device.type for tensor in made} == {'meta'}, made"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_gradients_are_clipped_in_place_with_the_same_numbers() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    flag, gradients = torch.zeros(1, dtype=torch.int), [torch.randn(5, 3), torch.randn(7)]
    expected = [gradient.clone() for gradient in gradients]
    local_multi_tensor_scale(1, flag, [expected, expected], 0.37)
    with torch.profiler.profile() as profile:
        clip_grads.multi_tensor_scale_impl(1, flag, [gradients, gradients], 0.37)
    assert all(map(torch.equal, gradients, expected))
    assert "aten::_foreach_mul_" in {event.key for event in profile.key_averages()}
    others = [torch.zeros_like(gradient) for gradient in gradients]
    clip_grads.multi_tensor_scale_impl(1, flag, [gradients, others], 2.0)
    assert all(torch.equal(other, 2 * gradient) for other, gradient in zip(others, gradients, strict=True))

"""The share of the tokens, against cases computed by hand."""

import subprocess
import sys

import pytest

from megatron_ext.offload.share import LayerLoad, Machine, host_bytes, largest_share, share_that_fits

GIB = 2**30
PCIE = Machine(bytes_per_second=50e9, flops_per_second=500e12, host_bytes=10**15)
WIDTH = 4096
"""Of a model of 7 billion parameters."""


def layer(tokens: int, *, ranks: int = 1) -> LayerLoad:
    """16 KB per token; 12 h^2 weights, and attention to half of the tokens on average."""
    flops = 24 * WIDTH**2 + 4 * WIDTH * tokens / 2
    return LayerLoad(whole=4096 / ranks, part=12288 / ranks, flops=flops / ranks)


def test_a_million_tokens_hide_everything() -> None:
    """16 KB take 0.33 us, 9.0 GFLOP take 18 us."""
    assert largest_share([layer(2**20)], 2**20, PCIE) == 1


def test_eight_thousand_tokens_do_not_where_the_link_is_slow() -> None:
    """0.47 GFLOP take 0.940 us, in which 8 GB/s copy 7516 bytes: 4096, and (7516 - 4096) / 12288 = 0.278."""
    slow = Machine(8e9, 500e12, 10**15)
    assert largest_share([layer(8192)], 8192, slow) == pytest.approx(0.278, abs=0.001)


def test_copies_that_never_hide() -> None:
    """What goes to the host anyway takes longer than the layer."""
    assert largest_share([LayerLoad(4096, 12288, 1e6)], 8192, PCIE) == 0


def test_the_slowest_layer_decides() -> None:
    """1e8 FLOP take 0.2 us, in which 10000 bytes are copied: (10000 - 4000) / 12000."""
    window = LayerLoad(4000, 12000, 1e8)
    assert largest_share([layer(2**20), window], 2**20, PCIE) == pytest.approx(0.5)


def test_host_memory_decides() -> None:
    """32 layers of 2^20 tokens: 4 KiB each are 128 GiB, of 12 KiB a share of 1/3 are other 128 GiB."""
    layers = [layer(2**20)] * 32
    half = Machine(50e9, 500e12, 256 * GIB)
    assert largest_share(layers, 2**20, half) == pytest.approx(1 / 3)
    assert host_bytes(layers, 2**20, 1 / 3) == 256 * GIB
    assert share_that_fits(layers, 2**20, 64 * GIB) == pytest.approx(-1 / 6)
    assert largest_share(layers, 2**20, Machine(50e9, 500e12, 64 * GIB)) == 0


def test_nothing_to_share() -> None:
    whole = LayerLoad(10, 0, 1e9)
    assert largest_share([whole], 10, PCIE) == 1
    assert share_that_fits([whole], 10, 99) == float("-inf")


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; import megatron_ext.model.offload_share, megatron_ext.validation.offload;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

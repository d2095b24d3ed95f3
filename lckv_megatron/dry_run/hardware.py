"""How long a GPU takes for what a rank does, and a network for what ranks send.

Rates are the makers', for one direction. What a run reaches of them is an assumption, stated with every time
that is made from it. Peaks and memories of GPUs are those of `megatron_ext.gpus`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_ext.errors import ConfigError
from megatron_ext.gpus import GPUS, Gpu


class Rates(NamedTuple):
    """Of one device, in GB/s."""

    memory: float

    links: float
    """To the other devices of its node, one direction: NVLink, or PCIe where the card has none."""


_RATES = {
    "H100": Rates(3350, 450),
    "H200": Rates(4800, 450),
    "B200": Rates(7700, 900),
    "A100": Rates(2039, 300),
    "A100-40GB": Rates(1555, 300),
    "L40S": Rates(864, 32),
    "A6000": Rates(768, 32),
    "RTX5090": Rates(1792, 64),
    "RTX4090": Rates(1008, 32),
    "RTX3090": Rates(936, 32),
    "L4": Rates(300, 32),
}
"""Of SXM boards where there are such. Data sheets."""


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    gb_per_second: float
    """Of each device, one direction."""


NETWORKS = {
    network.name: network
    for network in (Network("IB-200G", 25), Network("IB-400G", 50), Network("IB-800G", 100))
}


def rates_of(gpu: Gpu) -> Rates:
    """Of a GPU with a name.

    Raises ConfigError for one of which only the memory is known.
    """
    if gpu.name not in _RATES:
        raise ConfigError(
            f"--gpu is {gpu.name!r}; --dry-run estimates times and needs one of {', '.join(_RATES)}."
        )
    return _RATES[gpu.name]


@dataclass(frozen=True)
class Efficiency:
    """Shares of the makers' rates that are reached (assumed, not measured)."""

    products: float = 0.65
    memory: float = 0.8
    links: float = 0.75
    latency_seconds: float = 15e-6
    """Of one collective."""

    def describe(self) -> str:
        """In words."""
        return (
            f"{100 * self.products:g} % of the peak in products, {100 * self.memory:g} % of the memory's "
            f"rate, {100 * self.links:g} % of the links', {1e6 * self.latency_seconds:g} us a collective"
        )


@dataclass(frozen=True)
class Machine:
    """What a run stands on."""

    gpu: Gpu = GPUS["H100"]
    tflops: float = 989.4
    """Peak of one device in the run's precision, 10^12 FLOP/s."""
    network: Network = NETWORKS["IB-400G"]
    gpus_per_node: int = 8
    efficiency: Efficiency = Efficiency()

    @property
    def rates(self) -> Rates:
        """Of the GPU."""
        return rates_of(self.gpu)

    def work_seconds(self, flops: float, moved_bytes: float) -> float:
        """Of one kernel: as long as its products or its memory take, whichever is more."""
        products = flops / (self.tflops * 1e12 * self.efficiency.products)
        memory = moved_bytes / (self.rates.memory * 1e9 * self.efficiency.memory)
        return max(products, memory)

    def spans_nodes(self, ranks: tuple[int, ...]) -> bool:
        """Whether a group of ranks does not lie in one node."""
        return ranks[0] // self.gpus_per_node != ranks[-1] // self.gpus_per_node

    def transfer_seconds(self, link_bytes: float, ranks: tuple[int, ...]) -> float:
        """For so many bytes over the slowest link of a group."""
        links = self.rates.links
        if self.spans_nodes(ranks):
            links = self.network.gb_per_second
        return link_bytes / (links * 1e9 * self.efficiency.links) + self.efficiency.latency_seconds

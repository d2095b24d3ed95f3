"""GPUs and networks by name, and how long they take for what a rank does.

Rates are the makers', for dense products in bfloat16 and for one direction. What a run reaches of them is an
assumption, stated with every time that is made from it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device."""

    name: str
    memory_gib: float
    tflops: float
    """Dense bfloat16, 10^12 FLOP/s."""
    memory_gb_per_second: float
    nvlink_gb_per_second: float
    """To the other devices of its node, one direction."""


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    gb_per_second: float
    """Of each device, one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80", 79.0, 312, 2039, 300),
        Gpu("H100", 79.0, 989.4, 3350, 450),
        Gpu("H200", 139.0, 989.4, 4800, 450),
        Gpu("B200", 178.0, 2250, 7700, 900),
    )
}
NETWORKS = {
    network.name: network
    for network in (Network("IB-200G", 25), Network("IB-400G", 50), Network("IB-800G", 100))
}
RESERVED_GIB = 4.0
"""What a device needs beside tensors: CUDA's context, NCCL's buffers, workspaces of products, and what the
caching allocator loses between blocks (assumed)."""


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
    network: Network = NETWORKS["IB-400G"]
    gpus_per_node: int = 8
    efficiency: Efficiency = Efficiency()

    @property
    def usable_bytes(self) -> int:
        """For tensors."""
        return int((self.gpu.memory_gib - RESERVED_GIB) * 2**30)

    def work_seconds(self, flops: float, moved_bytes: float) -> float:
        """Of one kernel: as long as its products or its memory take, whichever is more."""
        products = flops / (self.gpu.tflops * 1e12 * self.efficiency.products)
        memory = moved_bytes / (self.gpu.memory_gb_per_second * 1e9 * self.efficiency.memory)
        return max(products, memory)

    def spans_nodes(self, ranks: tuple[int, ...]) -> bool:
        """Whether a group of ranks does not lie in one node."""
        return ranks[0] // self.gpus_per_node != ranks[-1] // self.gpus_per_node

    def transfer_seconds(self, link_bytes: float, ranks: tuple[int, ...]) -> float:
        """For so many bytes over the slowest link of a group."""
        links = self.gpu.nvlink_gb_per_second
        if self.spans_nodes(ranks):
            links = self.network.gb_per_second
        return link_bytes / (links * 1e9 * self.efficiency.links) + self.efficiency.latency_seconds

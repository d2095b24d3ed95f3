"""`python -m tests.lckv.compiled_kernels CAPABILITY ...`: compiles the Triton kernels for NVIDIA GPUs where
there is none, and prints as JSON what came of each. Capabilities: 80 is A100, 90 is H100.

The project's own launches run, on CPU tensors; what they would launch is compiled, with the sizes, dtypes and
alignments that Triton sees there.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from lckv.attention import pages
from lckv.attention.kernels import paged
from lckv.kernels import rope
from lckv.policies.dmc.kernels import pooling
from lckv.policies.dmc.pooling import LARGEST_KERNEL_WINDOW
from lckv.rope import Rotation, rotate

LAUNCHED = {
    pooling: ("_forward", "_backward_features", "_backward_normalisation", "_backward_decisions"),
    paged: ("_attend_chunk", "_merge"),
    rope: ("_turn",),
}
"""The kernels that are launched; the other functions for Triton are called by them."""


class NoGPU:
    """Triton's driver as it asks which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device: one for each kind."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiling:
    """In the place of a kernel: compiles where the kernel would run."""

    kernel: Any
    compiled: list[dict[str, Any]]

    def __getitem__(self, grid: Any) -> Any:
        def compile_instead(*arguments: Any, **sizes: Any) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **sizes)
            self.compiled.append(
                {
                    "kernel": self.kernel.__name__,
                    "capability": made.metadata.target.arch,
                    "sizes": sizes,
                    "shared": made.metadata.shared,
                    "bytes": len(made.asm["cubin"]),
                }
            )

        return compile_instead


@contextmanager
def compiling(module: ModuleType, capability: int) -> Iterator[list[dict[str, Any]]]:
    """Fills the list with what the launches of `module` compile."""
    compiled: list[dict[str, Any]] = []
    triton.runtime.driver.set_active(NoGPU(capability))
    kernels = {name: Compiling(getattr(module, name), compiled) for name in LAUNCHED[module]}
    with patch.multiple(module, **kernels):
        yield compiled


@dataclass(frozen=True)
class Pool:
    """Pooling of keys and values: heads of `channels`, in a window."""

    dtype: torch.dtype
    channels: int
    window: int

    module = pooling

    def launch(self) -> None:
        """Forward and backward."""
        key = torch.zeros(64, 2, 2, self.channels, dtype=self.dtype, requires_grad=True)
        merge, weight = (torch.zeros(64, 2, 2, requires_grad=True) for _ in range(2))
        pooled, _ = pooling.pool(key, key, merge, weight, self.window)
        pooled.sum().backward()


@dataclass(frozen=True)
class Paged:
    """Decoding: `group` query heads for each KV head, over pages of `page_size` slots."""

    dtype: torch.dtype
    channels: int
    group: int
    page_size: int = 16
    window: bool = False
    gap: bool = False

    module = paged

    def launch(self) -> None:
        """One head in each of two rows."""
        count = pages.pages_of_a_chunk(self.page_size, "cuda")
        first, stop = np.zeros(2, np.int64), np.full(2, 8)
        with patch.object(paged, "pages_of_a_chunk", lambda page_size, device_type: count):
            pool = torch.zeros(2, self.page_size, self.channels, dtype=self.dtype)
            table = torch.zeros(2, count, dtype=torch.int32)
            work = pages.list_work(
                first, stop, np.arange(2), page_size=self.page_size, columns=count, device=torch.device("cpu")
            )
            paged.attend_paged(
                torch.zeros(2, self.group, self.channels, dtype=self.dtype),
                pages.Pages(pool, pool, table),
                work,
                torch.from_numpy(first)[:, None] if self.window else None,
                torch.from_numpy(stop)[:, None],
                torch.from_numpy(stop)[:, None] - 2 if self.gap else None,
                scale=0.1,
            )


@dataclass(frozen=True)
class Rope:
    """`heads` heads of `channels`, a part of what a projection makes; `last`: with the channel of DMC."""

    dtype: torch.dtype
    channels: int
    heads: int
    last: bool = False

    module = rope

    def launch(self) -> None:
        """Forward and backward."""
        angles = Rotation(*torch.zeros(2, 16, 2, 1, self.channels // 2))
        projected = torch.zeros(16, 2, self.heads, 3 * self.channels, dtype=self.dtype, requires_grad=True)
        last = torch.zeros(16, 2, self.heads, dtype=self.dtype, requires_grad=True) if self.last else None
        turned = rotate(projected[..., : self.channels], angles, last=last, kernel=rope.turned)
        turned.sum().backward()


CASES: tuple[Pool | Paged | Rope, ...] = (
    Pool(torch.bfloat16, 128, 12),
    Pool(torch.float32, 256, LARGEST_KERNEL_WINDOW),
    Paged(torch.bfloat16, 128, 1, window=True),
    Paged(torch.bfloat16, 256, 32, gap=True),
    Paged(torch.float16, 80, 8, page_size=1, window=True),
    Paged(torch.float32, 256, 32),
    Rope(torch.bfloat16, 128, 32),
    Rope(torch.bfloat16, 128, 1, last=True),
    Rope(torch.float16, 80, 3),
    Rope(torch.float32, 256, 64, last=True),
)
"""Every kernel, each dtype, the sizes of known models, and the largest that are launched."""


def outcomes(capabilities: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Of each case for each card, what each of its launches compiled."""
    for capability in capabilities:
        for case in CASES:
            with compiling(case.module, capability) as compiled:
                case.launch()
            yield from ({"case": str(case), **one} for one in compiled)


if __name__ == "__main__":
    json.dump(list(outcomes(map(int, sys.argv[1:]))), sys.stdout)

"""Processes that do not exist: this one believes to be rank r of n, on the CPU, whatever the machine has.

PyTorch's backend `fake` makes groups of any size that answer at once and carry nothing. What Megatron asks
for beside it is replaced while the context is open:
- groups on gloo or NCCL are such groups, and only those that the rank is in are made;
- Python objects that are sent around come back as they went;
- random states are not looked at: tensors without numbers have none;
- `Module.bfloat16` changes parameters in place: tensors without numbers cannot be swapped;
- fused optimizers and functions for many tensors (Transformer Engine, Apex) are PyTorch's own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core import utils as megatron_utils
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.tensor_parallel import random as tensor_parallel_random

from lckv_megatron.dry_run.replacements import Replacement, replaced
from megatron_ext import cpu
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.process_groups import destroy, initialize

_RNG_STATE_BYTES = 5056
"""Of the CPU's generator: recomputation keeps them."""


@contextmanager
def pretended_world(parallel: ParallelConfig, *, rank: int, world_size: int, seed: int) -> Iterator[None]:
    """Megatron's process groups of rank `rank` among `world_size`. At the end nothing of them is left.

    Raises RuntimeError where torch.distributed runs already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "torch.distributed runs already in this process; pretend other processes in one of its own."
        )
    with ExitStack() as stack:
        no_cuda = [Replacement(torch.cuda, "is_available", lambda: False)]
        stack.enter_context(replaced(no_cuda))
        stack.enter_context(cpu.installed())
        stack.enter_context(replaced(_replacements(rank)))
        stack.enter_context(_force_eager())
        _start(rank, world_size)
        stack.callback(destroy)
        initialize(parallel, seed)
        yield


def _start(rank: int, world_size: int) -> None:
    # registers the backend "fake"
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _force_eager() -> Any:
    """Nothing is compiled."""
    return torch.compiler.set_stance("force_eager")


def _replacements(rank: int) -> Iterator[Replacement]:
    yield Replacement(dist, "new_group", _only_own_groups(dist.new_group, rank))
    yield Replacement(dist, "all_gather_object", _gather_own)
    yield Replacement(dist, "broadcast_object_list", lambda *args, **kwargs: None)
    yield Replacement(torch, "get_rng_state", lambda: torch.empty(_RNG_STATE_BYTES, dtype=torch.uint8))
    yield Replacement(torch, "set_rng_state", lambda state: None)
    yield Replacement(torch.cuda, "get_rng_state", lambda *args: torch.get_rng_state())
    yield Replacement(torch.cuda, "set_rng_state", lambda *args: None)
    yield Replacement(
        tensor_parallel_random, "_get_cuda_rng_state", lambda *args, **kw: torch.get_rng_state()
    )
    yield Replacement(tensor_parallel_random, "_set_cuda_rng_state", lambda *args, **kwargs: None)
    yield Replacement(tensor_parallel_random.CudaRNGStatesTracker, "fork", lambda self, *names: nullcontext())
    yield Replacement(torch.nn.Module, "bfloat16", _to_bfloat16)
    yield Replacement(megatron_optimizer, "Adam", torch.optim.AdamW)
    yield Replacement(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    local = {
        "multi_tensor_applier": megatron_utils.local_multi_tensor_applier,
        "multi_tensor_scale_impl": megatron_utils.local_multi_tensor_scale,
        "l2_norm_impl": _l2_norm,
    }
    for module in (clip_grads, mixed_precision):
        yield from (
            Replacement(module, name, value) for name, value in local.items() if hasattr(module, name)
        )


def _only_own_groups(new_group: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def make(ranks: list[int] | None = None, *args: Any, **options: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, backend="fake")

    return make


def _l2_norm(_chunk: int, _flag: torch.Tensor, tensors: list[list[torch.Tensor]], *_: Any) -> Any:
    """Of all tensors, float32 [1]; Megatron's own reads the numbers of the norms."""
    norms = [torch.linalg.vector_norm(tensor) for of_kind in tensors for tensor in of_kind]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def _gather_own(gathered: list[Any], mine: Any, group: Any = None) -> None:
    gathered[:] = [mine] * len(gathered)


def _to_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.bfloat16:
            tensor.data = tensor.data.to(torch.bfloat16)
    return module

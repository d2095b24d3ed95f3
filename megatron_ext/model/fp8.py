"""Which passes of the plan multiply in FP8, by Transformer Engine, and when it quantises weights.

Transformer Engine's layers multiply in FP8 inside of a context that Megatron makes. A weight is quantised
anew in every forward, unless the layer is told whether this is the first forward since the weight changed:
then it keeps the quantised weight. But the backward of the forward that was told "first" overwrites the
gradient, which several passes and micro-batches add up (`disable_parameter_transpose_cache` in
`transformer_config.py`). So only passes without gradient, which have no backward, are told:

    pass without gradient   0        1 .. m - 1    of each micro-batch
    a layer's first one     anew     (anew)        a layer that pass 0 leaves out comes to its first one later
    its other ones          kept     kept
    pass with gradient      anew     anew          not told
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils, tensor_parallel
from megatron.core.extensions import transformer_engine
from torch import Tensor

from lckv.sharing.plan import Step
from megatron_ext.model.transformer_config import SharedKVTransformerConfig


class Fp8Passes:
    """FP8 in the passes over the layers of one pipeline stage. Without FP8 it does nothing."""

    def __init__(self, config: SharedKVTransformerConfig, layers: Mapping[int, torch.nn.Module]) -> None:
        """`layers`: those of the stage, by their numbers in the model."""
        self._config = config
        self._no_gradient = copy.copy(config)
        self._no_gradient.fp8 = config.fp8_no_gradient
        self._told: dict[int, list[Any]] = {
            number: [module for module in layer.modules() if _can_be_told(module)]
            for number, layer in layers.items()
        }

    def whole(self) -> AbstractContextManager[Any]:
        """Around all passes of a micro-batch: FP8 where all passes are in it. One context, because
        Transformer Engine updates delayed scales at its end."""
        return fp8_utils.get_fp8_context(self._config) if self._config.fp8 else nullcontext()

    def around(self, step: Step) -> AbstractContextManager[Any]:
        """Around one pass: FP8 where only passes without gradient are in it."""
        if step.requires_grad or not (self._config.fp8 or self._no_gradient.fp8):
            return nullcontext()
        return self._without_gradient(step)

    @contextmanager
    def _without_gradient(self, step: Step) -> Iterator[None]:
        modules = [module for layer in range(step.start, step.stop) for module in self._told[layer]]
        for module in modules:
            module.disable_parameter_transpose_cache = False
            if step.number == 0:
                module.is_first_microbatch = True  # the module sets it to False after its forward
        alone = self._no_gradient.fp8
        try:
            with fp8_utils.get_fp8_context(self._no_gradient) if alone else nullcontext():
                yield
        finally:
            for module in modules:
                module.disable_parameter_transpose_cache = True


def checkpoint(
    config: SharedKVTransformerConfig, group: dist.ProcessGroup, function: Any, *arguments: Tensor | None
) -> Any:
    """What `function` returns for `arguments`, computed again in backward: in FP8 where it is in FP8 now.
    `group`: the tensor-parallel ranks."""
    if config.fp8:
        generators = tensor_parallel.get_cuda_rng_tracker
        return transformer_engine.te_checkpoint(function, False, generators, group, *arguments)
    return tensor_parallel.checkpoint(function, False, *arguments)


def _can_be_told(module: torch.nn.Module) -> bool:
    """Whether it is one of Megatron's wrappers of Transformer Engine's layers."""
    return hasattr(module, "is_first_microbatch") and hasattr(module, "disable_parameter_transpose_cache")

"""What a run says before it starts: what the program that plans one says, and the kernels chosen."""

from collections.abc import Iterator

import torch

from lckv.attention.backends import choose
from megatron_ext.model.specs import choose_implementation
from megatron_ext.summary.lines import cost_lines, layout_lines, model_lines, picture
from megatron_ext.summary.sizes import RunSizes


def describe(sizes: RunSizes, device: torch.device) -> Iterator[str]:
    """The run's summary, a line each."""
    yield picture(sizes)
    yield from model_lines(sizes)
    yield from cost_lines(sizes)
    yield from layout_lines(sizes)
    run = sizes.run
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    attention = choose(run.model.attention_backend, device=device, dtype=dtype, head_dim=sizes.shape.head_dim)
    layers = choose_implementation(run.model.transformer_impl)
    yield f"attention             {attention.name} ({attention.reason})"
    yield f"layers                {layers.name} ({layers.reason})"

"""What a run says before it starts: what the program that plans one says, and the kernels chosen."""

from collections.abc import Iterator

import torch

from lckv.pass_errors import reporter_of
from megatron_ext.model.attention_backend import choose_backend
from megatron_ext.model.implementation import choose_implementation
from megatron_ext.model.loss_backend import choose_loss
from megatron_ext.model.operators import choose_operators
from megatron_ext.model.transformer_config import device_peak_tflops
from megatron_ext.precision import precision
from megatron_ext.summary.lines import cost_lines, host_lines, layout_lines, model_lines, picture
from megatron_ext.summary.sizes import RunSizes


def describe(sizes: RunSizes, device: torch.device) -> Iterator[str]:
    """The run's summary, a line each."""
    yield picture(sizes)
    yield from model_lines(sizes)
    for statistic in reporter_of(sizes.run.compression).statistics:
        yield f"reported as           {statistic.name}/layer_I/head_J: {statistic.text}"
    yield from cost_lines(sizes)
    yield from layout_lines(sizes)
    yield from host_lines(sizes, device_peak_tflops(sizes.run.train.precision))
    model = sizes.run.model
    dtype = precision(sizes.run.train.precision).dtype
    attention = choose_backend(
        model.attention_backend, device=device, dtype=dtype, head_dim=sizes.shape.head_dim
    )
    loss = choose_loss(model, sizes.run.parallel, sizes.run.train.precision, device=device)
    layers = choose_implementation(model.transformer_impl, sizes.run.train.precision)
    yield f"attention             {attention.name} ({attention.reason})"
    yield f"layers                {layers.name} ({layers.reason})"
    operators = choose_operators(model, sizes.run.parallel, device=device)
    if layers.name == "local":
        yield f"RMSNorm               {operators.rms_norm.name} ({operators.rms_norm.reason})"
    yield f"SwiGLU                {operators.swiglu.name} ({operators.swiglu.reason})"
    yield f"RoPE                  {operators.rope.name} ({operators.rope.reason})"
    if sizes.run.train.distillation.teacher is None:
        yield f"loss                  {loss.name} ({loss.reason})"
    else:
        yield "loss                  chunked (learns from a teacher)"

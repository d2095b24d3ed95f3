"""What the pages of recipes say that a run costs, computed as they say it."""

from lckv.cost import training_cost
from megatron_ext.config import RunConfig
from megatron_ext.model.cost import model_shape

PEAK_TFLOPS, UTILISATION = 989.4, 0.4
"""Of an H100 in bf16 without sparsity; the share of it that the pages assume."""


def gpu_hours(run: RunConfig, *, vocab_size: int) -> float:
    """GPU-hours of a run: operations of all its tokens, without recomputation, at the assumed speed."""
    shape = model_shape(run.model, vocab_size=vocab_size, seq_length=run.train.seq_length)
    tokens = run.train.train_iters * run.train.global_batch_size * run.train.seq_length
    flops = training_cost(shape, run.compression).model_flops * tokens
    return flops / (UTILISATION * PEAK_TFLOPS * 1e12 * 3600)

"""Logits of the tokens in a file, written to a file, row by row."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lckv.precision import exact_products
from megatron_ext.config import ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.logits import compute_logits
from megatron_ext.files import check_input, check_output
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from megatron_ext.restoring.model import restore


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Tokens int64 [B, T] of a .npy file; ConfigError where they are not that, or outside the vocabulary."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokens {path} cannot be read as a .npy file: {error}") from error
    if tokens.dtype != np.int64 or tokens.ndim != 2 or 0 in tokens.shape:
        raise ConfigError(
            f"--tokens {path} is {tokens.dtype} {list(tokens.shape)}; it must be int64 [B, T], not empty."
        )
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        raise ConfigError(
            f"--tokens {path} holds the token {lowest if lowest < 0 else highest}; the model knows 0 to "
            f"{vocab_size - 1}."
        )
    return tokens


def dump_logits(
    load: Path,
    tokens_path: Path,
    output: Path,
    parallel: ParallelConfig,
    rows_at_once: int,
    layer_types: str | None = None,
) -> None:
    """Compute and write; every process that torchrun started calls it. `layer_types`: see `restore`."""
    if rows_at_once < 1:
        raise ConfigError(f"--rows_at_once is {rows_at_once}; it must be at least 1.")
    check_output("--output", output)
    check_input("--tokens", tokens_path)
    initialize(parallel, seed=1)
    restored = restore(load, parallel, layer_types=layer_types)
    tokens = read_tokens(tokens_path, restored.stage.vocab_size)
    with exact_products():
        write_logits(restored.stage, tokens, output, rows_at_once=rows_at_once)
    destroy()


def write_logits(stage: SharedKVGPTModel, tokens: np.ndarray, output: Path, *, rows_at_once: int = 1) -> None:
    """Write float32 [B, T, true vocabulary] for `tokens` int64 [B, T] to `output`, a .npy file, which gets
    its name when it is whole. Every process calls it; data-parallel replicas share out the rows."""
    shape, unfinished = (*tokens.shape, stage.vocab_size), output.with_name(f".{output.name}.tmp")
    if dist.get_rank() == 0:
        np.lib.format.open_memmap(unfinished, "w+", np.float32, shape).flush()
    dist.barrier()
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    writes = parallel_state.is_pipeline_last_stage() and ranks == (0, 0)
    logits = np.lib.format.open_memmap(unfinished, "r+") if writes else None
    first, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for start in range(rows_at_once * first, len(tokens), rows_at_once * replicas):
        part = slice(start, start + rows_at_once)
        computed = compute_logits(stage, torch.from_numpy(np.array(tokens[part])).to(device_of_rank()))
        if logits is not None and computed is not None:
            logits[part] = computed.cpu().numpy()
    if logits is not None:
        logits.flush()
    dist.barrier()
    if dist.get_rank() == 0:
        unfinished.replace(output)

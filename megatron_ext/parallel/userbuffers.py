"""Buffers by which Transformer Engine overlaps tensor-parallel communication with products of matrices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.errors import ConfigError


@contextmanager
def userbuffers(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> Iterator[None]:
    """The buffers of this process, of [sequence * micro-batch, hidden], until the end of the context; nothing
    without parallel.tp_comm_overlap. Layers are built and run inside. Needs process groups; all ranks call it
    together."""
    if not parallel.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    base.initialize_ub(
        shape=[parallel.tokens_of_rank(train.seq_length) * train.micro_batch_size, model.hidden_size],
        tp_size=parallel.tensor_model_parallel_size,
        ub_cfgs=read_overlap_settings(parallel.tp_comm_overlap_cfg),
        bootstrap_backend=parallel.tp_comm_bootstrap_backend,
        **_numbers_of_buffers(base, model),
    )
    try:
        yield
    finally:
        base.destroy_ub()


def _numbers_of_buffers(base: Any, model: ModelConfig) -> dict[str, Any]:
    """What the buffers hold, as the module `base` takes it: before Transformer Engine 2.7 one kind only."""
    modes = getattr(base, "UserBufferQuantizationMode", None)
    if modes is None:
        return {"use_fp8": model.fp8 is not None}
    if model.fp8 is None:
        return {"quantization_modes": [modes.NONE]}
    others = [modes.NONE] if model.fp8_passes == "no_gradient" else []
    return {"quantization_modes": [modes.FP8, *others]}


def read_overlap_settings(path: str | None) -> dict[str, dict[str, Any]] | None:
    """parallel.tp_comm_overlap_cfg: settings by product; None for Transformer Engine's own.

    Raises ConfigError where the file cannot be read or holds something else.
    """
    if path is None:
        return None
    name = f"parallel.tp_comm_overlap_cfg is {path}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}, which cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise ConfigError(f"{name}; it must map names of products, such as qkv_fprop, to their settings.")
    return content

"""Buffers by which Transformer Engine overlaps tensor-parallel communication with products of matrices."""

from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig


def start_userbuffers(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> None:
    """Makes the buffers of this process, of [sequence * batch, hidden]; the ranks meet over NCCL. To be
    called once, before layers are built."""
    from transformer_engine.pytorch.module.base import initialize_ub

    initialize_ub(
        shape=[train.seq_length * train.micro_batch_size, model.hidden_size],
        tp_size=parallel.tensor_model_parallel_size,
        bootstrap_backend="nccl",
    )

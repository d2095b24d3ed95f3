"""From the run's sections to a model that trains: this rank's pipeline stage, in the training precision,
under Megatron's DDP."""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from lckv.config import CompressionConfig
from lckv.rope import RotaryEmbedding
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.implementation import choose_implementation
from megatron_ext.model.initialization import initialize_weights
from megatron_ext.model.loss_backend import choose_loss
from megatron_ext.model.parameters import padded_vocab_size
from megatron_ext.model.specs import block_submodules
from megatron_ext.model.trainable import choose_trainable
from megatron_ext.model.transformer_config import transformer_config
from megatron_ext.parallel.lone import data_parallel_class
from megatron_ext.precision import precision


def build_stage(
    model: ModelConfig,
    compression: CompressionConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    *,
    vocab_size: int,
) -> SharedKVGPTModel:
    """This rank's pipeline stage with initial weights, on this rank's device,
    in float32 or bfloat16. Needs process groups."""
    config = transformer_config(model, compression, parallel, train, vocab_size=vocab_size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layers = config.placed.layers_of(groups.pp.rank())
    implementation = choose_implementation(model.transformer_impl, train.precision)
    stage = SharedKVGPTModel(
        config,
        block_submodules(config.layer_types, layers, implementation.name),
        rope=RotaryEmbedding(
            model.head_dim,
            model.rotary_base,
            model.rope_scaling.scaling,
            model.max_position_embeddings or train.seq_length,
        ),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size(vocab_size, model, parallel),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        loss=choose_loss(model, parallel, train.precision),
        recompute_num_layers=train.recompute_num_layers,
        pg_collection=groups,
    )
    if torch.cuda.is_available():
        stage.cuda(torch.cuda.current_device())
    initialize_weights(stage, seed=train.seed, std=model.init_method_std)
    return stage


def wrap(stage: SharedKVGPTModel, parallel: ParallelConfig, train: TrainConfig) -> MegatronModule:
    """The stage under Megatron's mixed precision and data parallelism;
    gradients are accumulated and reduced in float32. What `train` does not train is frozen."""
    config = stage.config
    choose_trainable(stage, train.trainable)
    module = precision(train.precision).wrap(config, stage)
    ddp = data_parallel_class(parallel)(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            align_param_gather=parallel.align_param_gather,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
            bucket_size=parallel.ddp_bucket_size,
            pad_buckets_for_high_nccl_busbw=parallel.ddp_pad_buckets_for_high_nccl_busbw,
        ),
        module,
    )
    ddp.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = ddp.no_sync
    return ddp

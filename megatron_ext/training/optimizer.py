"""Megatron's AdamW and its learning-rate schedule."""

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainConfig
from megatron_ext.precision import precision

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
"""Dtypes of an optimizer's state, as Megatron takes them: 8 bits are plain bytes."""


def build_optimizer(
    optimizer: OptimizerConfig, parallel: ParallelConfig, train: TrainConfig, model: MegatronModule
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer of `model` (under DDP) and its schedule, whose steps are iterations."""
    numbers = precision(train.precision)
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=numbers.is_bf16,
        params_dtype=numbers.dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        use_precision_aware_optimizer=optimizer.use_precision_aware_optimizer,
        main_params_dtype=_DTYPES[optimizer.main_params_dtype],
        exp_avg_dtype=_DTYPES[optimizer.exp_avg_dtype],
        exp_avg_sq_dtype=_DTYPES[optimizer.exp_avg_sq_dtype],
        # Otherwise checkpoints hold the lower halves of main weights only, and no other run can read them.
        store_param_remainders=False,
        optimizer_cpu_offload=optimizer.optimizer_cpu_offload,
        optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=optimizer.overlap_cpu_optimizer_d2h_h2d,
    )
    built = get_megatron_optimizer(config, [model])
    _fuse_on_cpu(built)
    return built, _scheduler(built, optimizer, train)


def _fuse_on_cpu(built: MegatronOptimizer) -> None:
    """Lets torch's AdamW, which Megatron takes where there is no CUDA, update each parameter in one pass over
    its numbers. It is told so only while it steps: the settings that checkpoints keep are those of any other
    machine.
    """
    for part in getattr(built, "chained_optimizers", [built]):
        adam = part.optimizer
        on_cpu = isinstance(adam, torch.optim.AdamW) and all(
            parameter.device.type == "cpu" for group in adam.param_groups for parameter in group["params"]
        )
        if on_cpu:
            adam.register_step_pre_hook(lambda stepping, *_: _set_fused(stepping, True))
            adam.register_step_post_hook(lambda stepping, *_: _set_fused(stepping, None))


def _set_fused(adam: torch.optim.Optimizer, fused: bool | None) -> None:
    for group in adam.param_groups:
        group["fused"] = fused


def _scheduler(
    built: MegatronOptimizer, config: OptimizerConfig, train: TrainConfig
) -> OptimizerParamScheduler:
    decay_iters = config.lr_decay_iters or train.train_iters
    return OptimizerParamScheduler(
        built,
        init_lr=config.lr / max(1, config.lr_warmup_iters),  # not 0: the first step would do nothing
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=decay_iters,
        lr_decay_style=config.lr_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        # A schedule changed on resuming counts, not the one in the checkpoint.
        override_opt_param_scheduler=True,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train.train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters or max(1, decay_iters // 10),
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )

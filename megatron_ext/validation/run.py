"""What cannot work in a run's settings, all of it at once, before any process group or GPU starts.

One function per section yields sentences: field and value, what is required, the way out. A value that is
wrong by itself is reported by itself; relations between values are checked between usable values only, so no
check trips over another's.
"""

import importlib.util
from collections.abc import Iterator

from lckv.rope_scaling import longest_context
from megatron_ext.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ext.data.blends import split_sources
from megatron_ext.errors import ConfigError
from megatron_ext.precision import precision
from megatron_ext.validation.context import context_step_problems
from megatron_ext.validation.distillation import distillation_problems
from megatron_ext.validation.family import evaluated_map_problems
from megatron_ext.validation.fp8 import fp8_problems
from megatron_ext.validation.layout import data_parallel_problems, layout_problems, recompute_problems
from megatron_ext.validation.offload import offload_problems
from megatron_ext.validation.options import option_problems
from megatron_ext.validation.profile import profile_problems
from megatron_ext.validation.rules import above_zero, at_least, fraction

LARGEST_SEED = 2**31 - 1


def validate(run: RunConfig, world_size: int) -> None:
    """Raises ConfigError with a numbered list of everything in `run`
    that cannot work on `world_size` processes."""
    sentences = problems(run, world_size)
    if sentences:
        count = "1 setting" if len(sentences) == 1 else f"{len(sentences)} settings"
        lines = [f"  {number}. {problem}" for number, problem in enumerate(sentences, 1)]
        raise ConfigError("\n".join([f"{count} cannot work:", *lines]))


def problems(run: RunConfig, world_size: int) -> list[str]:
    """Everything in `run` that cannot work on `world_size` processes, one sentence each; empty if nothing."""
    return [
        *step_problems(run, world_size),
        *_train(run.model, run.train),
        *evaluated_map_problems(run),
        *_optimizer(run.optimizer),
        *_schedule(run.optimizer, run.train),
        *_data(run.data, run.train),
        *_vocabulary(run.model, run.data),
        *_checkpoint(run.checkpoint, run.train),
        *_ways_of_saving(run.checkpoint, run.parallel),
        *_logging(run.logging),
        *profile_problems(run, world_size),
        *option_problems(run, world_size),
        *fp8_problems(run),
        *distillation_problems(run),
        *_optional_packages(run),
    ]


def step_problems(run: RunConfig, world_size: int) -> list[str]:
    """Everything in `run` that keeps the numbers of a step from being computed: what cannot work in the
    model, its layout on `world_size` processes and the sizes of a step."""
    sizes = ("train_iters", "micro_batch_size", "global_batch_size", "seq_length", "recompute_num_layers")
    return [
        *layout_problems(run),
        *data_parallel_problems(run.parallel, run.train, world_size),
        *recompute_problems(run),
        *offload_problems(run),
        *context_step_problems(run),
        *at_least("train", run.train, 1, *sizes),
    ]


def _train(model: ModelConfig, train: TrainConfig) -> Iterator[str]:
    yield from at_least("train", train, 0, "eval_interval", "manual_gc_interval")
    yield from above_zero("train", train, "exit_duration_minutes")
    if train.eval_interval > 0:
        yield from at_least("train", train, 1, "eval_iters")
    if not 0 <= train.seed <= LARGEST_SEED:
        yield f"train.seed is {train.seed}; it must be from 0 to {LARGEST_SEED}."
    given = model.max_position_embeddings
    longest = None if given is None else longest_context(model.rope_scaling.scaling, given)
    if longest is not None and longest < train.seq_length:
        times = "" if longest == given else " x model.rope_scaling.factor"
        yield (
            f"model.max_position_embeddings{times} is {longest} and train.seq_length is {train.seq_length}; "
            "the former must be at least the latter: raise it, or leave it out."
        )


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    yield from above_zero("optimizer", optimizer, "lr", "adam_eps")
    yield from at_least("optimizer", optimizer, 0, "weight_decay", "clip_grad", "lr_warmup_iters")
    yield from at_least("optimizer", optimizer, 1, "lr_decay_iters", "lr_wsd_decay_iters")
    yield from fraction("optimizer", optimizer, "adam_beta1", "adam_beta2")
    yield from at_least("optimizer", optimizer, 0, "min_lr")
    yield from _idle_decay(optimizer)
    if optimizer.min_lr > optimizer.lr > 0:
        yield (
            f"optimizer.min_lr is {optimizer.min_lr} and optimizer.lr is {optimizer.lr}; the former must be "
            "at most the latter."
        )


def _idle_decay(optimizer: OptimizerConfig) -> Iterator[str]:
    """Settings of the decay of WSD, which another schedule does not have."""
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_style"):
        value = getattr(optimizer, name)
        if optimizer.lr_decay_style != "WSD" and value != getattr(OptimizerConfig, name):
            yield (
                f"optimizer.{name} is {value} and optimizer.lr_decay_style is {optimizer.lr_decay_style}, "
                "which does not read it: set the latter to WSD, or leave the former out."
            )


def _schedule(optimizer: OptimizerConfig, train: TrainConfig) -> Iterator[str]:
    given = optimizer.lr_decay_iters is not None
    end = optimizer.lr_decay_iters if optimizer.lr_decay_iters is not None else train.train_iters
    end_name = (
        "optimizer.lr_decay_iters" if given else "train.train_iters (the default of optimizer.lr_decay_iters)"
    )
    warmup = optimizer.lr_warmup_iters
    if end < 1 or warmup < 0:
        return
    if warmup >= end:
        yield (
            f"optimizer.lr_warmup_iters is {warmup} and {end_name} is {end}; the former must be less than "
            "the latter."
        )
    decay = optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style == "WSD" and decay is not None and decay > end - warmup >= 1:
        yield (
            f"optimizer.lr_wsd_decay_iters is {decay}; between optimizer.lr_warmup_iters {warmup} and "
            f"{end_name} {end} there are {end - warmup} iterations: set it to at most that."
        )


def _data(data: DataConfig, train: TrainConfig) -> Iterator[str]:
    yield from _mock(data) if data.mock else _sources(data, train)
    yield from _format(data)
    yield from above_zero("data", data, "index_timeout_minutes")
    yield from at_least("data", data, 0, "num_workers")
    if data.tokenizer_type != "none" and data.tokenizer_model is None:
        yield (
            f"data.tokenizer_type is {data.tokenizer_type} and data.tokenizer_model is not set; give its "
            "directory or file."
        )
    if data.tokenizer_type == "none" and data.tokenizer_model is not None:
        yield (
            f"data.tokenizer_model is {data.tokenizer_model} and data.tokenizer_type is none; set the latter "
            "to the kind of tokenizer: huggingface, sentencepiece or tiktoken."
        )


def _mock(data: DataConfig) -> Iterator[str]:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    given = [f"data.{name}" for name in names if getattr(data, name)]
    if given:
        yield f"data.mock is true and {', '.join(given)} is given; use random documents or files, not both."


def _format(data: DataConfig) -> Iterator[str]:
    if data.format == "chat" and data.mock:
        yield "data.format is chat and data.mock is true; random documents are no conversations: give files."
    if data.format == "chat" and data.eod_mask_loss:
        yield (
            "data.eod_mask_loss is true and data.format is chat; a conversation has no token after its end: "
            "leave data.eod_mask_loss out."
        )
    if data.format != "chat" and data.chat_overlong != DataConfig.chat_overlong:
        yield (
            f"data.chat_overlong is {data.chat_overlong} and data.format is {data.format}; only "
            "conversations can be too long: set data.format to chat, or leave data.chat_overlong out."
        )


def _sources(data: DataConfig, train: TrainConfig) -> Iterator[str]:
    try:
        _, validation, _ = split_sources(data)
    except ConfigError as error:
        yield from str(error).splitlines()
        return
    if train.eval_interval > 0 and validation is None:
        yield (
            f"train.eval_interval is {train.eval_interval} and there is no validation data; give "
            "data.valid_data_path, a second share in data.split, or set train.eval_interval to 0."
        )


def _vocabulary(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    if data.mock and model.vocab_size is None and data.tokenizer_type == "none":
        yield (
            "data.mock is true and the vocabulary is unknown; set model.vocab_size, or data.tokenizer_type "
            "and tokenizer_model."
        )


def _checkpoint(checkpoint: CheckpointConfig, train: TrainConfig) -> Iterator[str]:
    yield from at_least("checkpoint", checkpoint, 0, "save_interval")
    yield from at_least("checkpoint", checkpoint, 1, "keep_last")
    yield from above_zero("checkpoint", checkpoint, "save_timeout_minutes", "load_timeout_minutes")
    for name in ("save", "load"):
        if getattr(checkpoint, name) == "":
            yield f"checkpoint.{name} is empty; give a directory, or null."
    way_out = "checkpoint.save is not set; give the directory to save into"
    if checkpoint.save is None and checkpoint.resume == "must":
        yield f"checkpoint.resume is must and {way_out}, or set checkpoint.resume to auto."
    if checkpoint.save is None and checkpoint.save_interval > 0:
        yield (
            f"checkpoint.save_interval is {checkpoint.save_interval} and {way_out}, or set the interval to 0."
        )
    if checkpoint.save is None and train.exit_duration_minutes is not None:
        yield (
            f"train.exit_duration_minutes is {train.exit_duration_minutes} and {way_out}, or the work is "
            "lost."
        )
    if checkpoint.finetune and checkpoint.load is None:
        yield "checkpoint.finetune is true and checkpoint.load is not set; give the checkpoint to start from."


def _ways_of_saving(checkpoint: CheckpointConfig, parallel: ParallelConfig) -> Iterator[str]:
    if checkpoint.save is None and checkpoint.async_save:
        yield (
            "checkpoint.async_save is true and checkpoint.save is not set; give the directory to save into, "
            "or set the former to false."
        )
    if checkpoint.optimizer_sharding == "dp_reshardable" and not parallel.use_distributed_optimizer:
        yield (
            "checkpoint.optimizer_sharding is dp_reshardable and parallel.use_distributed_optimizer is "
            "false; the former is of the distributed optimizer: set the latter to true, or the former to "
            "fully_reshardable."
        )


def _logging(logging: LoggingConfig) -> Iterator[str]:
    yield from at_least("logging", logging, 1, "log_interval")
    yield from above_zero("logging", logging, "peak_tflops")
    if logging.wandb_name is not None and logging.wandb_project is None:
        yield (
            f"logging.wandb_name is {logging.wandb_name} and logging.wandb_project is not set; give the "
            "project."
        )


def _optional_packages(run: RunConfig) -> Iterator[str]:
    """Explicit requests for what is not installed or does not run here; nothing falls back."""
    logging, model = run.logging, run.model
    wandb = logging.wandb_project is not None and logging.wandb_mode != "disabled"
    if wandb and importlib.util.find_spec("wandb") is None:
        yield (
            f"logging.wandb_project is {logging.wandb_project}, but the package wandb is not installed; "
            "pip install 'lckv-megatron[wandb]', or set logging.wandb_mode to disabled."
        )
    if run.parallel.fault_tolerance and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        yield (
            "parallel.fault_tolerance is true, but the package nvidia-resiliency-ext is not installed; pip "
            "install nvidia-resiliency-ext and start the run with its ft_launcher, or set the former to "
            "false."
        )
    if model.transformer_impl == "transformer_engine":
        yield from _refusal_of_transformer_engine(run.train.precision)
    if model.attention_backend in ("flash", "flash3") and (
        model.kv_channels or model.num_attention_heads > 0
    ):
        yield from _refusal_of_flash(run)
    if model.operator_backend == "triton" and model.num_attention_heads > 0:
        yield from _refusal_of_operators(run)
    if model.cross_entropy_backend not in ("auto", "chunked"):
        yield from _refusal_of_loss(run)


# Torch and Megatron are imported below only: whoever asks for none of this gets the answer in milliseconds.


def _refusal_of_transformer_engine(precision: str) -> Iterator[str]:
    from megatron_ext.model.implementation import choose_implementation

    try:
        choose_implementation("transformer_engine", precision)
    except ConfigError as error:
        yield str(error)


def _refusal_of_loss(run: RunConfig) -> Iterator[str]:
    from megatron_ext.model.loss_backend import choose_loss

    try:
        choose_loss(run.model, run.parallel, run.train.precision)
    except ConfigError as error:
        yield str(error)


def _refusal_of_operators(run: RunConfig) -> Iterator[str]:
    from megatron_ext.model.operators import choose_operators

    try:
        choose_operators(run.model, run.parallel)
    except ConfigError as error:
        yield str(error)


def _refusal_of_flash(run: RunConfig) -> Iterator[str]:
    import torch

    from megatron_ext.model.attention_backend import choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision(run.train.precision).dtype
    try:
        choose_backend(run.model.attention_backend, device=device, dtype=dtype, head_dim=run.model.head_dim)
    except ConfigError as error:
        yield str(error)

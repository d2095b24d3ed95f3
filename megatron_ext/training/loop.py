"""The training run: build, resume, iterate, evaluate, save."""

import logging
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.checkpointing.load import load_checkpoint
from megatron_ext.checkpointing.save import save_checkpoint
from megatron_ext.command_line import config_to_dict
from megatron_ext.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.data.checks import find_vocabulary
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.loader import build_data_iterator
from megatron_ext.data.samples import SampleDataset
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.loss import Evaluation, evaluate
from megatron_ext.model.architecture import architecture
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.model.cost import model_shape
from megatron_ext.model.parameters import padded_vocab_size
from megatron_ext.parallel.process_groups import device_of_rank
from megatron_ext.schedule.micro_batches import MakeBatch
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.report import Report, open_report
from megatron_ext.training.start import Start, check_space, prepared, write_settings
from megatron_ext.training.step import require_finite, train_step
from megatron_ext.training.stopping import stop_requests
from megatron_ext.training.succession import check_succession, check_weights, end_stage, policy_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """How far the run is."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after_step(self, samples: int, seq_length: int) -> "Position":
        """One optimizer step further."""
        tokens = self.consumed_tokens + samples * seq_length
        return Position(self.iteration + 1, self.consumed_samples + samples, tokens)

    def progress(self, train: TrainConfig) -> float:
        """Share of the run that is done, in samples, 0 .. 1."""
        return min(1.0, self.consumed_samples / (train.train_iters * train.global_batch_size))


@dataclass(frozen=True)
class Training:
    """Everything that one rank's training loop works on."""

    run: RunConfig
    model: MegatronModule
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    datasets: Datasets
    make_batch: MakeBatch
    stored_config: dict[str, Any]
    """The run's settings as checkpoints keep them."""


def fit(run: RunConfig) -> Position:
    """Train `run` to its last iteration, or until it is asked to stop.
    Needs process groups. Returns how far it came."""
    torch.use_deterministic_algorithms(run.train.deterministic)
    with prepared(run.checkpoint) as start:
        return _fit(run, start)


def _fit(run: RunConfig, start: Start) -> Position:
    vocab_size, eod = vocabulary(run.model, run.data)
    stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=vocab_size)
    parameters = _count_parameters(stage)
    check_space(run, parameters)
    model = wrap(stage, run.parallel, run.train)
    optimizer, scheduler = build_optimizer(run.optimizer, run.parallel, run.train, model)
    defining = {"architecture": architecture(run.model, run.compression, vocab_size=vocab_size)}
    position = _resume(run, start, model, optimizer, scheduler, defining)
    training = Training(
        run,
        model,
        optimizer,
        scheduler,
        _datasets(run, position, vocab_size, eod),
        partial(make_batch, data=run.data, eod=eod, device=device_of_rank()),
        {**config_to_dict(run), **defining},
    )
    write_settings(run)
    padded = padded_vocab_size(vocab_size, run.model, run.parallel)
    shape = model_shape(run.model, vocab_size=padded, seq_length=run.train.seq_length)
    with open_report(run, shape, parameters=parameters, start_iteration=position.iteration) as report:
        return _iterate(training, position, report)


def vocabulary(model: ModelConfig, data: DataConfig) -> tuple[int, int | None]:
    """True vocabulary size and end-of-document token, from model.vocab_size, the tokenizer or the datasets.

    Raises ConfigError where none of them says, or where they contradict each other.
    """
    known = find_vocabulary(data)
    if model.vocab_size is None and known is None:
        raise ConfigError(
            "model.vocab_size is not set and neither a tokenizer nor the dataset's description tells it; "
            "set model.vocab_size, or data.tokenizer_type and data.tokenizer_model."
        )
    if known is not None and model.vocab_size is not None and model.vocab_size < known.size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, but the vocabulary of {known.origin} has {known.size} "
            f"tokens; leave model.vocab_size out, or set it to at least {known.size}."
        )
    size = model.vocab_size or (known.size if known is not None else 0)
    return size, known.eod if known is not None else None


def _count_parameters(stage: torch.nn.Module) -> int:
    """Parameters of the whole model; tensor-parallel duplicates and a tied output layer count once."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    count = 0.0
    for parameter in stage.parameters():
        if getattr(parameter, "shared", False):
            continue
        split = getattr(parameter, "tensor_model_parallel", False)
        count += parameter.numel() / (1 if split else tensor)
    total = torch.tensor(count, dtype=torch.float64, device=device_of_rank())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return round(total.item())


def _resume(
    run: RunConfig,
    start: Start,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    defining: Mapping[str, Any],
) -> Position:
    if start.load is None:
        return Position()
    with start.explained():
        loaded = load_checkpoint(
            Path(start.load),
            model=[model],
            optimizer=optimizer,
            scheduler=scheduler,
            finetune=start.finetune,
            verify_hashes=run.checkpoint.verify_hashes,
            expected_model=defining,
            seed=run.train.seed,
            timeout_minutes=run.checkpoint.load_timeout_minutes,
        )
        before, policy = policy_of(loaded.config), run.compression.policy
        check_succession(before, policy, finetune=start.finetune)
        check_weights(model, policy.build(), before)
    if start.finetune:
        return Position()
    return Position(**{name: int(loaded.progress[name]) for name in asdict(Position())})


def _datasets(run: RunConfig, position: Position, vocab_size: int, eod: int | None) -> Datasets:
    train = run.train
    samples = position.consumed_samples + (train.train_iters - position.iteration) * train.global_batch_size
    evaluated = train.eval_iters * train.global_batch_size if train.eval_interval else None
    return build_datasets(
        run.data,
        seq_length=train.seq_length,
        num_samples=(max(0, samples), evaluated, None),
        seed=train.seed,
        vocab_size=vocab_size,
        eod=eod,
    )


def _iterator(
    training: Training, dataset: SampleDataset, consumed_samples: int
) -> Generator[dict[str, Tensor]]:
    run = training.run
    return build_data_iterator(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=run.train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        num_workers=run.data.num_workers,
        seed=run.train.seed,
    )


def _iterate(training: Training, position: Position, report: Report) -> Position:
    run, saved = training.run, position.iteration
    if training.datasets.train is None:
        raise ConfigError(
            "there is no training data; give data.data_path, data.train_data_path or data.mock."
        )
    reason = None
    # Closed on leaving: an error's traceback would keep the reading processes alive, and Python waits for
    # them at its exit.
    reading = closing(_iterator(training, training.datasets.train, position.consumed_samples))
    with reading as samples, stop_requests(run.train.exit_duration_minutes) as stop:
        while position.iteration < run.train.train_iters and reason is None:
            result = train_step(
                training.model,
                training.optimizer,
                training.scheduler,
                samples,
                training.make_batch,
                run.train,
                progress=position.progress(run.train),
            )
            position = position.after_step(run.train.global_batch_size, run.train.seq_length)
            require_finite(result, position.iteration, run.train)
            report.step(position.iteration, position.consumed_samples, position.consumed_tokens, result)
            last = position.iteration == run.train.train_iters
            if last:
                end_stage(training.model, training.optimizer, run.compression.policy.build())
            reason = stop.agreed()
            if run.train.eval_interval and (last or position.iteration % run.train.eval_interval == 0):
                report.validation(position.iteration, position.consumed_tokens, _validate(training, position))
            if (
                run.checkpoint.save
                and run.checkpoint.save_interval
                and position.iteration % run.checkpoint.save_interval == 0
            ):
                saved = _save(training, position)
                report.restart_clock()
    if run.checkpoint.save and saved != position.iteration:
        _save(training, position)
    if reason is not None:
        logger.info("stopped after iteration %d: %s", position.iteration, reason)
    return position


def _validate(training: Training, position: Position) -> Evaluation:
    """Over the same validation samples each time."""
    dataset = training.datasets.valid
    if dataset is None:
        raise ConfigError(
            f"train.eval_interval is {training.run.train.eval_interval}, but there is no validation data; "
            "give a validation share in data.split, or data.valid_data_path, or set train.eval_interval to 0."
        )
    gathers_late = training.run.parallel.overlap_param_gather
    if gathers_late:
        training.model.disable_forward_pre_hook()
    train = training.run.train
    with closing(_iterator(training, dataset, 0)) as samples:
        evaluation = evaluate(
            training.model, samples, training.make_batch, train, progress=position.progress(train)
        )
    if gathers_late:
        training.model.enable_forward_pre_hook()
    return evaluation


def _save(training: Training, position: Position) -> int:
    assert training.run.checkpoint.save is not None
    save_checkpoint(
        Path(training.run.checkpoint.save),
        position.iteration,
        model=[training.model],
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        progress=asdict(position),
        config=training.stored_config,
        keep_last=training.run.checkpoint.keep_last,
        timeout_minutes=training.run.checkpoint.save_timeout_minutes,
    )
    return position.iteration

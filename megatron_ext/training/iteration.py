"""The iterations of a run: step, save, evaluate, until the last one or a request to stop."""

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.checkpointing.save import Saves, saves
from megatron_ext.checkpointing.writing import RunState
from megatron_ext.config import CheckpointConfig, RunConfig, TrainConfig
from megatron_ext.data.datasets import Datasets
from megatron_ext.data.loader import build_data_iterator
from megatron_ext.data.samples import SampleDataset
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.loss import Evaluation, evaluate
from megatron_ext.last_word import PASSED_ON, say_last
from megatron_ext.schedule.micro_batches import MakeBatch, Teach
from megatron_ext.signals import Interrupted
from megatron_ext.training.around_steps import Around, around_steps
from megatron_ext.training.continuation import ORDER_KEY
from megatron_ext.training.measured import MEASURED_KEY, Measurements
from megatron_ext.training.passes import compression_of_step, evaluated_maps
from megatron_ext.training.report import Report
from megatron_ext.training.signs_of_life import Beat, signs_of_life
from megatron_ext.training.step import require_finite, train_step
from megatron_ext.training.stopping import StopRequest, stop_requests
from megatron_ext.training.succession import end_stage

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
        """Share of the run's iterations that is done, 0 .. 1."""
        return min(1.0, self.iteration / train.train_iters)


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
    measurements: Measurements

    teach: Teach | None = None
    """Of the teacher that is learned from."""


def iterate(training: Training, position: Position, report: Report, *, owes_evaluation: bool) -> Position:
    """Train from `position` to the last iteration, or until a signal or the clock stops the run; the last
    checkpoint is of where it ended. Returns how far it came.

    An iteration that is saved and evaluated is saved first. With `owes_evaluation` that of `position` is
    made up for.

    Raises Interrupted where a signal stops a run that saves nothing, ConfigError without data to train on,
    NonFiniteLossError and NonFiniteStatisticError.
    """
    run = training.run
    with (
        stop_requests(run.train.exit_duration_minutes) as stop,
        signs_of_life(run) as beat,
        _saves(run.checkpoint) as saving,
        around_steps(run, training.model) as around,
    ):
        reason = _validate(training, position, report, stop, beat) if owes_evaluation else None
        if reason is None and position.iteration < run.train.train_iters:
            try:
                position, reason = _train(training, position, report, stop, beat, saving, around)
            except ArithmeticError:  # of a step, on all ranks: what was saved before is good
                if saving is not None:
                    saving.finish()
                raise
    if reason is not None:
        _say_why(reason, stop.number, position, run)
    return position


def _saves(checkpoint: CheckpointConfig) -> AbstractContextManager[Saves | None]:
    """The saves of a run; None for one that saves nothing."""
    if checkpoint.save is None:
        return nullcontext()
    return saves(
        Path(checkpoint.save),
        keep_last=checkpoint.keep_last,
        timeout_minutes=checkpoint.save_timeout_minutes,
        in_background=checkpoint.async_save,
        sharding=checkpoint.optimizer_sharding,
    )


def _train(
    training: Training,
    position: Position,
    report: Report,
    stop: StopRequest,
    beat: Beat,
    saving: Saves | None,
    around: Around,
) -> tuple[Position, str | None]:
    """Where training ended, saved if anything is, and why, if it was before the last iteration."""
    run, saved, reason = training.run, position.iteration, None
    if training.datasets.train is None:
        raise ConfigError(
            "there is no training data; give data.data_path, data.train_data_path or data.mock."
        )
    # Closed on leaving: an error's traceback would keep the reading processes alive, and Python waits for
    # them at its exit.
    with closing(_iterator(training, training.datasets.train, position.consumed_samples)) as samples:
        while position.iteration < run.train.train_iters and reason is None:
            beat(position.iteration + 1)
            compression = compression_of_step(
                run.compression, run.train, run.model.num_layers, position.iteration
            )
            with around(position.iteration + 1):
                result = train_step(
                    training.model,
                    training.optimizer,
                    training.scheduler,
                    samples,
                    training.make_batch,
                    run.train,
                    progress=position.progress(run.train),
                    compression=compression,
                    teach=training.teach,
                )
            position = position.after_step(run.train.global_batch_size, run.train.seq_length)
            if saving is not None and saving.in_flight:
                _go_on(saving, saving.settle, stop, report)
            require_finite(result, position.iteration, run.train, training.datasets.train.origin)
            training.measurements.step(position.iteration, result)
            report.step(position.iteration, position.consumed_samples, position.consumed_tokens, result)
            if position.iteration == run.train.train_iters:
                end_stage(training.model, training.optimizer, run.compression.policy.build())
            reason = stop.agreed()
            if saving is not None and _is_saved(run, position, stops=reason is not None):
                beat(position.iteration)
                with stop.saving():
                    saved = _save(training, position, saving, stop, report)
            if reason is None and is_evaluated(run.train, position):
                reason = _validate(training, position, report, stop, beat)
    if saving is not None:
        if saved != position.iteration:  # it stopped while it evaluated
            _save(training, position, saving, stop, report)
        _go_on(saving, saving.finish, stop, report)
    return position, reason


def is_evaluated(train: TrainConfig, position: Position) -> bool:
    """Whether the model is evaluated after the iteration of `position`."""
    if not train.eval_interval or position.iteration == 0:
        return False
    return position.iteration == train.train_iters or position.iteration % train.eval_interval == 0


def _is_saved(run: RunConfig, position: Position, *, stops: bool) -> bool:
    if run.checkpoint.save is None:
        return False
    interval = run.checkpoint.save_interval
    last = stops or position.iteration == run.train.train_iters
    return last or bool(interval and position.iteration % interval == 0)


def _say_why(reason: str, number: int, position: Position, run: RunConfig) -> None:
    line = f"stopped after iteration {position.iteration}: {reason}"
    if run.checkpoint.save is None and number:
        raise Interrupted(number, f"{line}; nothing is saved, checkpoint.save is not set")
    line += f"; saved in {run.checkpoint.save}"
    logger.info("%s", line)
    if number in PASSED_ON and dist.get_rank() == 0:
        say_last(line)


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


def _validate(
    training: Training, position: Position, report: Report, stop: StopRequest, beat: Beat
) -> str | None:
    """Over the same validation samples each time. Returns why the run must stop, if it must: what was left of
    the evaluation then is not done."""
    dataset = training.datasets.valid
    if dataset is None:
        raise ConfigError(
            f"train.eval_interval is {training.run.train.eval_interval}, but there is no validation data; "
            "give a validation share in data.split, or data.valid_data_path, or set train.eval_interval to 0."
        )
    gathers_late = training.run.parallel.overlap_param_gather
    if gathers_late:
        training.model.disable_forward_pre_hook()
    train, reason = training.run.train, None

    def stops() -> bool:
        nonlocal reason
        beat(position.iteration)
        reason = stop.agreed()
        return reason is not None

    compression, evaluations = training.run.compression, dict[str, Evaluation]()
    family = compression.family(training.run.model.num_layers)
    for layer_types in evaluated_maps(family, train):
        with closing(_iterator(training, dataset, 0)) as samples:
            evaluation = evaluate(
                training.model,
                samples,
                training.make_batch,
                train,
                progress=position.progress(train),
                stops=stops,
                compression=compression if family.only else compression.with_map(layer_types),
            )
        if evaluation is None:
            break
        evaluations[str(layer_types)] = evaluation
    if gathers_late:
        training.model.enable_forward_pre_hook()
    if reason is None:
        of_maps = {} if family.only else evaluations
        first = next(iter(evaluations.values()))
        training.measurements.validation(position.iteration, first, of_maps)
        report.validation(position.iteration, position.consumed_tokens, first, of_maps)
    return reason


def _save(training: Training, position: Position, saving: Saves, stop: StopRequest, report: Report) -> int:
    assert training.datasets.order is not None
    state = RunState(
        [training.model],
        training.optimizer,
        training.scheduler,
        progress={
            **asdict(position),
            ORDER_KEY: training.datasets.order.to_dict(),
            MEASURED_KEY: training.measurements.to_json(),
        },
        config=training.stored_config,
    )
    _go_on(saving, lambda: saving.save(position.iteration, state), stop, report)
    return position.iteration


def _go_on(saving: Saves, step: Callable[[], None], stop: StopRequest, report: Report) -> None:
    """A step of the saves; what it took, and whether one is in flight then, is told to who must know."""
    step()
    report.stood_still(saving.stalled_seconds())
    stop.save_in_flight(saving.in_flight)

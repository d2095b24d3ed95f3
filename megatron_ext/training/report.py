"""What a run says while it trains, from rank 0: its summary, then progress and metrics."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from lckv.cost import ModelShape
from lckv.pass_errors import reporter_of
from megatron_ext.command_line import config_to_dict
from megatron_ext.config import LoggingConfig, RunConfig
from megatron_ext.data.order import SourceUse
from megatron_ext.evaluation.loss import Evaluation
from megatron_ext.gpus import peak_tflops
from megatron_ext.parallel.process_groups import device_of_rank
from megatron_ext.schedule.statistics_meter import PolicyMeans
from megatron_ext.summary.lines import data_lines
from megatron_ext.summary.sizes import RunSizes, TeacherSizes
from megatron_ext.training.metrics import MetricsWriter, Value, reports_lack_validation
from megatron_ext.training.progress import Progress
from megatron_ext.training.step import StepResult
from megatron_ext.training.summary import describe
from megatron_ext.training.teacher import terms_of
from megatron_ext.training.throughput import Throughput, memory

logger = logging.getLogger(__name__)


class Report:
    """Reports of a run; on ranks other than 0 `writer` and `progress` are None and nothing happens."""

    def __init__(
        self, run: RunConfig, throughput: Throughput, writer: MetricsWriter | None, progress: Progress | None
    ) -> None:
        self._run, self._throughput, self._writer, self._progress = run, throughput, writer, progress
        self._reporter = reporter_of(run.compression)
        self._iterations = 0
        self._since = time.perf_counter()
        self._stalled = 0.0

    def step(self, iteration: int, consumed_samples: int, consumed_tokens: int, result: StepResult) -> None:
        """After an optimizer step: every `logging.log_interval` iterations, and at the end, report it."""
        self._iterations += 1
        if iteration % self._run.logging.log_interval and iteration != self._run.train.train_iters:
            return
        seconds = time.perf_counter() - self._since
        tokens = self._iterations * self._run.train.global_batch_size * self._run.train.seq_length
        values: dict[str, Value] = {
            "lm_loss": result.lm_loss,
            **self._of_teacher(result),
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_tokens,
            "iteration_seconds": seconds / self._iterations,
            **memory(),
            **self._throughput.metrics(tokens, seconds),
            **self._of_policy(result.policy, iteration),
        }
        if result.layer_types is not None:
            values["layer_types"] = result.layer_types
        if self._stalled > 0:
            values["save_stall_seconds"] = self._stalled
        self._stalled = 0.0
        self._write(iteration, values)
        self.restart_clock()

    def validation(
        self, iteration: int, consumed_tokens: int, evaluation: Evaluation, of_maps: Mapping[str, Evaluation]
    ) -> None:
        """After an evaluation; its time does not count as training. `of_maps`: of the maps of a family, the
        first of which is `evaluation`."""
        values = {**self._of_evaluation(evaluation), "consumed_tokens": consumed_tokens}
        for layer_types, one in of_maps.items():
            values |= {f"{name}/{layer_types}": value for name, value in self._of_evaluation(one).items()}
        if of_maps:
            values["validation_layer_types"] = next(iter(of_maps))
        self._write(iteration, values)
        self.restart_clock()

    def _of_evaluation(self, evaluation: Evaluation) -> dict[str, Value]:
        perplexity = math.exp(evaluation.loss) if evaluation.loss < 700 else math.inf
        reported = {} if evaluation.policy is None else evaluation.policy.report(self._reporter, None)
        return {
            "validation_loss": evaluation.loss,
            "validation_perplexity": perplexity,
            **{f"validation_{name}": value for name, value in reported.items()},
        }

    def _of_policy(self, means: PolicyMeans | None, iteration: int) -> dict[str, Value]:
        """What the KV policy reports, and its statistics of every layer and KV head."""
        if means is None:
            return {}
        before = (iteration - 1) / self._run.train.train_iters
        return {**means.report(self._reporter, before), **means.by_head()}

    def _of_teacher(self, result: StepResult) -> dict[str, Value]:
        """How far the student is from its teacher, where there is one."""
        settings = self._run.train.distillation
        if settings.teacher is None:
            return {}
        return {"distillation_loss": terms_of(settings).divergence_of(result.objective, result.lm_loss)}

    def stood_still(self, seconds: float) -> None:
        """The run has waited for a save: that is reported, and is no time of training."""
        self._stalled += seconds
        self._since += seconds

    def restart_clock(self) -> None:
        """Count time and iterations from now on."""
        self._iterations, self._since = 0, time.perf_counter()

    def _write(self, iteration: int, values: dict[str, Value]) -> None:
        if self._writer is not None and self._progress is not None:
            self._writer.write(iteration, values)
            self._progress.report(iteration, values)


def lacks_validation(logging_config: LoggingConfig, iteration: int) -> bool:
    """Whether the metrics file of a run that goes on from `iteration` has reports up to it, but not of its
    evaluation. Collective over all ranks: rank 0 looks."""
    path = logging_config.metrics_file
    answer = [dist.get_rank() == 0 and path is not None and reports_lack_validation(Path(path), iteration)]
    dist.broadcast_object_list(answer, src=0)
    return bool(answer[0])


@contextmanager
def open_report(
    run: RunConfig,
    shape: ModelShape,
    *,
    parameters: int,
    start_iteration: int,
    uses: Mapping[str, Sequence[SourceUse]],
    teacher: TeacherSizes | None = None,
) -> Iterator[Report]:
    """The reports of a run that goes on from `start_iteration`, beginning with its summary; `uses`: what its
    data are drawn from."""
    device, world_size = device_of_rank(), dist.get_world_size()
    sizes = RunSizes(run, shape, world_size, parameters, teacher)
    cost = sizes.cost
    peak = run.logging.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device), run.train.precision)
    throughput = Throughput(cost.model_flops, cost.hardware_flops, world_size, peak)
    if dist.get_rank() != 0:
        yield Report(run, throughput, None, None)
        return
    lines = [*describe(sizes, device), *data_lines(uses, run.train.seq_length)]
    logger.info("\n%s", "\n".join(lines))
    with MetricsWriter(
        run.logging,
        resumed_iteration=start_iteration,
        settings=config_to_dict(run),
        notes=_folders_of_notes(run),
    ) as writer:
        progress = Progress(run.train.train_iters, start_iteration, run.logging.progress_bar)
        try:
            yield Report(run, throughput, writer, progress)
        finally:
            progress.close()


def _folders_of_notes(run: RunConfig) -> list[Path]:
    """Where this run notes things, first, and where the run that it goes on from may have."""
    folders = [Path(run.checkpoint.save)] if run.checkpoint.save is not None else []
    if run.logging.metrics_file is not None:
        folders.append(Path(run.logging.metrics_file).parent)
    if run.checkpoint.load is not None:
        load = Path(run.checkpoint.load)
        folders += [load, load.absolute().parent] if folders else []
    return folders

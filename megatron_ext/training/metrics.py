"""Where the numbers of a run go: a JSON-lines file, TensorBoard, Weights & Biases. Built by one rank only."""

import json
import logging
import math
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_ext.atomic import write_file
from megatron_ext.config import LoggingConfig
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

Value = float | int | str
NOT_FINITE = "not_finite"
"""Key of a note on values that JSON cannot express: {name: "nan", "inf" or "-inf"}.
The values themselves are null."""


class Sink(Protocol):
    """A place that numbers are written to."""

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """One report."""

    def close(self) -> None:
        """The end of the run."""


class MetricsWriter:
    """Writes each report to every place that the configuration names. A context manager.

    `resumed_iteration` is the iteration that the run continues from, 0 for a fresh one: later reports of an
    interrupted run are dropped, so that the file of a resumed run has the lines of an uninterrupted one.
    `settings` (nested dictionaries) are shown in Weights & Biases; source code, the state of git and what is
    printed are not sent there.
    """

    def __init__(
        self, config: LoggingConfig, *, resumed_iteration: int = 0, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._sinks: list[Sink] = []
        if config.metrics_file is not None:
            self._sinks.append(JsonLines(Path(config.metrics_file), resumed_iteration))
        if config.tensorboard_dir is not None:
            self._sinks.append(TensorBoard(config.tensorboard_dir, resumed_iteration))
        if config.wandb_project is not None and config.wandb_mode != "disabled":
            self._sinks.append(WeightsAndBiases(config, settings or {}))

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Report `values` (scalars by name, such as lm_loss, grad_norm, tokens_per_second) of `iteration`."""
        for sink in self._sinks:
            sink.write(iteration, values)

    def close(self) -> None:
        """Finish all writing."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonLines:
    """One JSON object per report, on the disk as soon as it is written."""

    def __init__(self, path: Path, resumed_iteration: int) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _keep_until(path, resumed_iteration)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"logging.metrics_file {path} cannot be written: {error.strerror}; choose another."
            ) from error

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Append a line; raises ConfigError naming the file where there is no space left."""
        try:
            self._file.write(json_line(iteration, values))
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"logging.metrics_file {self._path} cannot be written at iteration {iteration}: "
                f"{error.strerror}; make room, or choose another file, and resume."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def json_line(iteration: int, values: Mapping[str, Value]) -> str:
    """A report as one line of valid JSON, whatever the numbers."""
    odd = {
        name: str(value)
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    record: dict[str, object] = {"iteration": iteration, **values, **dict.fromkeys(odd)}
    if odd:
        record[NOT_FINITE] = odd
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports of a metrics file, in order. An unfinished last line, of a file being written, is left out.

    Raises OSError, or ConfigError naming the line that is no report.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    reports = []
    for number, line in enumerate(lines, 1):
        report = _parse(line)
        if report is not None:
            reports.append(report)
        elif number < len(lines):
            raise ConfigError(
                f"{path}, line {number} is no report of a run: a JSON object with an iteration is expected."
            )
    return reports


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and isinstance(report.get("iteration"), int) else None


def _keep_until(path: Path, iteration: int) -> None:
    """Drop from a file the reports after `iteration`;
    a fresh run (0) moves a whole file of earlier reports aside."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if iteration == 0:
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        logger.warning("%s holds the reports of an earlier run; it is now %s", path, aside)
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [
        line for line in lines if (report := _parse(line)) is not None and report["iteration"] <= iteration
    ]
    if len(kept) < len(lines):
        write_file(path, b"".join(kept))
        logger.info("%s: %d reports after iteration %d are dropped", path, len(lines) - len(kept), iteration)


class TensorBoard:
    """Event files of torch.utils.tensorboard."""

    def __init__(self, directory: str, resumed_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(directory, purge_step=resumed_iteration + 1)
        except OSError as error:
            raise ConfigError(
                f"logging.tensorboard_dir {directory} cannot be written: {error}; choose another."
            ) from error

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """The numbers among `values`."""
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, online or offline."""

    def __init__(self, config: LoggingConfig, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_name,
                mode=config.wandb_mode,
                config=dict(settings),
                settings=wandb.Settings(disable_code=True, disable_git=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb_project {config.wandb_project} cannot be reported to (logging.wandb_mode is "
                f"{config.wandb_mode}): {error} Set logging.wandb_mode to offline, or mend the connection."
            ) from error

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """All of `values`."""
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()

"""Where the numbers of a run go: a JSON-lines file, TensorBoard, Weights & Biases. Built by one rank only."""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
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
WANDB_NOTE = "wandb_run.json"
"""Beside the checkpoints: project and id of the run in Weights & Biases."""


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
    printed are not sent there. The run of Weights & Biases is noted in the first of the folders `notes`; one
    that goes on looks for it in all of them.
    """

    def __init__(
        self,
        config: LoggingConfig,
        *,
        resumed_iteration: int = 0,
        settings: Mapping[str, Any] | None = None,
        notes: Sequence[Path] = (),
    ) -> None:
        self._sinks: list[Sink] = []
        if config.metrics_file is not None:
            self._sinks.append(JsonLines(Path(config.metrics_file), resumed_iteration))
        if config.tensorboard_dir is not None:
            self._sinks.append(TensorBoard(config.tensorboard_dir, resumed_iteration))
        if config.wandb_project is not None and config.wandb_mode != "disabled":
            self._sinks.append(WeightsAndBiases(config, settings or {}, notes, resumes=resumed_iteration > 0))

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
        check_metrics_file(path)
        _keep_until(path, resumed_iteration)
        self._file = path.open("a", encoding="utf-8")

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


def check_places(config: LoggingConfig) -> None:
    """Raises ConfigError by name where nothing can be written to a file or folder that is reported to."""
    if config.heartbeat_file is not None:
        _check_folder_of(Path(config.heartbeat_file))
    if config.metrics_file is not None:
        check_metrics_file(Path(config.metrics_file))
    if config.tensorboard_dir is not None and "://" not in config.tensorboard_dir:
        try:
            Path(config.tensorboard_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.tensorboard_dir):
                pass
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be, with a null byte
            raise _unusable_board(config.tensorboard_dir, error) from error


def _check_folder_of(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be, with a null byte
        raise ConfigError(
            f"logging.heartbeat_file {path} cannot be written: {error}; choose another."
        ) from error


def check_metrics_file(path: Path) -> None:
    """Make its folder and, empty, the file; raises ConfigError by name where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_odd = path.exists() and not (path.is_file() or path.is_char_device())
        if not is_odd:
            path.open("ab").close()
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be, with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"logging.metrics_file {path} cannot be written: {reason}; choose another."
        ) from error
    if is_odd:
        raise ConfigError(f"logging.metrics_file {path} is no file that can be written; choose another.")


def _unusable_board(directory: str, error: Exception) -> ConfigError:
    return ConfigError(f"logging.tensorboard_dir {directory} cannot be written: {error}; choose another.")


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


def reports_lack_validation(path: Path, iteration: int) -> bool:
    """Whether a metrics file has reports up to `iteration`, but none of its evaluation."""
    if not path.is_file():
        return False
    until = [report for report in read_metrics(path) if report["iteration"] <= iteration]
    return bool(until) and not any(
        report["iteration"] == iteration and "validation_loss" in report for report in until
    )


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
    read_metrics(path)  # a file of something else is left as it is
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
        except (OSError, ValueError) as error:
            raise _unusable_board(directory, error) from error

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
    """A run of wandb, online or offline; with `resumes` the one that a file in one of the folders `notes`
    names. Steps that it has already are not replaced."""

    def __init__(
        self, config: LoggingConfig, settings: Mapping[str, Any], notes: Sequence[Path], *, resumes: bool
    ) -> None:
        import wandb

        earlier = _noted_run(notes, config.wandb_project) if resumes else None
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_name,
                id=earlier,
                resume=None if earlier is None else "allow",
                mode=config.wandb_mode,
                config=dict(settings),
                settings=wandb.Settings(disable_code=True, disable_git=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb_project {config.wandb_project} cannot be reported to (logging.wandb_mode is "
                f"{config.wandb_mode}): {error} Set logging.wandb_mode to offline, or mend the connection."
            ) from error
        if notes:
            note = {"project": config.wandb_project, "id": self._run.id}
            write_file(notes[0] / WANDB_NOTE, json.dumps(note).encode())

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """All of `values`."""
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _noted_run(folders: Sequence[Path], project: str | None) -> str | None:
    """The id of the run that goes on, if it was of the same project."""
    for folder in folders:
        try:
            note = json.loads((folder / WANDB_NOTE).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(note, dict) and note.get("project") == project and isinstance(note.get("id"), str):
            return str(note["id"])
    return None

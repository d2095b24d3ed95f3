"""The runs that curves are drawn of, from their metrics files. matplotlib is not loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.training.metrics import read_metrics

METRICS_NAME = "metrics.jsonl"
_SPEEDS = ("model_tflops_per_device", "tokens_per_second_per_device")
X_LABELS = {
    "iteration": "iteration",
    "consumed_tokens": "tokens trained on",
    "flops": "floating-point operations of the model",
}


@dataclass(frozen=True)
class Run:
    """The reports of one run."""

    name: str
    reports: list[dict[str, Any]]

    def series(self, value: str, x: str, start: float = 0) -> tuple[list[float], list[float]]:
        """Abscissas from `start` and ordinates of the reports that have `value`;
        a value that was not finite is nan."""
        # A validation report need not repeat what the step's report says of the same iteration.
        places = self._flops if x == "flops" else self._places(x)
        points = [
            (places[report["iteration"]], math.nan if report[value] is None else report[value])
            for report in self.reports
            if value in report and places.get(report["iteration"], -math.inf) >= start
        ]
        return [place for place, _ in points], [ordinate for _, ordinate in points]

    def _places(self, x: str) -> dict[int, float]:
        return {report["iteration"]: report[x] for report in self.reports if report.get(x) is not None}

    @cached_property
    def _flops(self) -> dict[int, float]:
        """Operations until each iteration, from tokens and the operations per token that the speed tells: a
        stage may need others than the one before. Computing again in backward is not counted."""
        flops, tokens, places = 0.0, 0, {}
        for report in self.reports:
            speed, per_second = (report.get(name) for name in _SPEEDS)
            if not speed or not per_second or report.get("consumed_tokens") is None:
                continue
            flops += (report["consumed_tokens"] - tokens) * speed * 1e12 / per_second
            tokens = report["consumed_tokens"]
            places[report["iteration"]] = flops
        return places


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at `paths`, named by their directories;
    raises ConfigError naming the file that cannot be drawn."""
    files = [path / METRICS_NAME if path.is_dir() else path for path in paths]
    runs = []
    for file, name in zip(files, _names(files), strict=True):
        try:
            reports = read_metrics(file)
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be read: {error.strerror}; give a metrics file (logging.metrics_file of the "
                f"run) or a directory with {METRICS_NAME} in it."
            ) from error
        if not reports:
            raise ConfigError(
                f"{file} has no reports yet; the run writes one every logging.log_interval iterations."
            )
        runs.append(Run(name, reports))
    return runs


def _names(files: Sequence[Path]) -> list[str]:
    """A short name for each file: as many of its last directories as tell it from the others."""
    parts = [file.resolve().parts[:-1] for file in files]
    if any(file.name != METRICS_NAME for file in files):
        parts = [file.resolve().with_suffix("").parts for file in files]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names

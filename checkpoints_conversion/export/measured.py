"""What was measured on a model while it was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.conversion_record import ConversionRecord
from megatron_ext.training.measured import MEASURED_KEY, OF_MAPS_KEY
from megatron_ext.training.metrics import read_metrics


@dataclass(frozen=True)
class Measured:
    """The numbers, and where they were measured."""

    compression_ratio: float | None = None
    """Tokens per slot that the policy reaches; at least 1."""

    validation_loss: float | None = None
    """Cross-entropy per token, in nats."""

    iteration: int | None = None
    """After which they were measured; None: not known."""

    at_end: bool = True
    """Whether that is the iteration of the weights."""

    in_training: bool = False
    """Whether the ratio is that of training, whose decisions are soft, for want of an evaluation."""

    @property
    def where(self) -> str:
        """For a sentence on the ratio: words with a space before them."""
        on = " in training" if self.in_training else " on validation text"
        return on if self.at_end else f"{on} after {self.iteration:,} iterations"


def of_map(training: Mapping[str, Any], layer_types: str, family: str) -> dict[str, Any]:
    """What is known of a run that trained a family of maps, `training`, for the model with one of them: of
    what was measured that which is of this map."""
    progress = dict(training.get("progress") or {})
    evaluated = (progress.pop(MEASURED_KEY, {}).get("validation") or {}).get(OF_MAPS_KEY) or {}
    if layer_types in evaluated:
        progress[MEASURED_KEY] = {"validation": evaluated[layer_types]}
    return {**training, "progress": progress, "layer_types": layer_types, "map_family": family}


def measured_in(
    training: Mapping[str, Any] | None, record: ConversionRecord | None, metrics_file: Path | None
) -> Measured | None:
    """What is known of a checkpoint's weights: from the evaluation at its iteration in `metrics_file`, else
    from what the checkpoint itself has noted. `training`: see `OpenModel`; where that is None, the weights
    are those of the run in `record`, unless they were changed since. None where nothing is known."""
    while training is None and record is not None and record.initialization is None:
        training, record = record.training, record.previous
    progress = (training or {}).get("progress") or {}
    iteration, drawn = progress.get("iteration"), (training or {}).get("layer_types")
    suffix = "" if drawn is None else f"/{drawn}"
    if metrics_file is not None and metrics_file.is_file():
        for report in reversed(read_metrics(metrics_file)):
            loss = report.get(f"validation_loss{suffix}")
            if report["iteration"] == iteration and loss is not None:
                return Measured(report.get(f"validation_compression_ratio{suffix}"), loss, iteration)
    return _noted(progress.get(MEASURED_KEY) or {}, iteration)


def _noted(notes: Mapping[str, Mapping[str, Any]], iteration: int | None) -> Measured | None:
    """What a checkpoint has noted; earlier versions have noted nothing."""
    evaluation, step = notes.get("validation"), notes.get("training")
    if evaluation is not None:
        at = evaluation.get("iteration")
        return Measured(
            evaluation.get("compression_ratio"), evaluation.get("loss"), at, at_end=at == iteration
        )
    if step is not None:
        return Measured(step.get("compression_ratio"), iteration=step.get("iteration"), in_training=True)
    return None

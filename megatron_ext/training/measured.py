"""What a run has measured on its model. A checkpoint keeps it, so that the page of an exported model can say
it, also where the run's metrics file is gone."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who reads what a checkpoint keeps waits neither for torch nor for Megatron
    from lckv.pass_errors import Reporter
    from megatron_ext.evaluation.loss import Evaluation
    from megatron_ext.schedule.statistics_meter import PolicyMeans
    from megatron_ext.training.step import StepResult

MEASURED_KEY = "measured"
"""Where a checkpoint's progress keeps it: `training` and `validation`, each with the `iteration` that it is
of, the `loss` in nats per token, and what the KV policy reports, such as `compression_ratio` (tokens per
slot)."""

OF_MAPS_KEY = "of_maps"
"""Where `validation` keeps, of a family of maps, the same numbers of each of them that was evaluated."""


class Measurements:
    """The newest numbers of training and of validation."""

    def __init__(self, reporter: "Reporter", before: Mapping[str, Any] | None = None) -> None:
        """`before`: progress of the checkpoint that the run goes on from."""
        self._reporter = reporter
        self._evaluation: dict[str, Any] | None = (before or {}).get(MEASURED_KEY, {}).get("validation")
        self._step: tuple[int, StepResult] | None = None

    def step(self, iteration: int, result: "StepResult") -> None:
        """After an optimizer step."""
        self._step = iteration, result

    def validation(
        self, iteration: int, evaluation: "Evaluation", of_maps: "Mapping[str, Evaluation]"
    ) -> None:
        """After an evaluation; `of_maps`: of the maps of a family, one of which is `evaluation`."""
        self._evaluation = self._facts(iteration, evaluation.loss, evaluation.policy)
        if of_maps:
            self._evaluation[OF_MAPS_KEY] = {
                layer_types: self._facts(iteration, one.loss, one.policy)
                for layer_types, one in of_maps.items()
            }

    def to_json(self) -> dict[str, Any]:
        """Fit for `json.dumps`; what was not measured is left out."""
        facts = {"validation": self._evaluation}
        if self._step is not None:
            iteration, result = self._step
            facts["training"] = self._facts(iteration, result.lm_loss, result.policy)
        return {name: values for name, values in facts.items() if values is not None}

    def _facts(self, iteration: int, loss: float, means: "PolicyMeans | None") -> dict[str, Any]:
        reported = {} if means is None else means.report(self._reporter, None)
        finite = {name: value for name, value in {"loss": loss, **reported}.items() if math.isfinite(value)}
        return {"iteration": iteration, **finite}

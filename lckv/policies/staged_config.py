"""What the settings of policies that learn decisions in stages have in common.

Stage zero_out frees a channel that decisions are to be read from, retrofit trains them while the target
rises, finetune keeps the target.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from lckv.errors import Problem
from lckv.policies.config import PolicyConfig

STAGES = ("zero_out", "retrofit", "finetune")


class StagedConfig(PolicyConfig, ABC):
    """The base of a frozen dataclass that has the fields below, with their defaults and descriptions."""

    stage: str
    target_compression_ratio: float
    temperature: float
    loss_weight: float
    initial_compression_ratio: float = 1.0
    """What retrofit begins with."""

    ramp: float = 1.0
    """Share of retrofit after which the target is reached."""

    effect: ClassVar[str]
    """What is decided of a token, as in "decides what is ..."."""

    without: ClassVar[str]
    """What a model does that has no such decisions, as in "the model ..."."""

    @property
    @abstractmethod
    def channel(self) -> str:
        """What decisions are read from, for people."""

    @property
    def decides(self) -> bool:
        """Whether there are decisions; in stage zero_out there are none yet."""
        return self.stage != "zero_out"

    @property
    def compression_ratio(self) -> float:
        """See `PolicyConfig`."""
        return self.target_compression_ratio if self.decides else 1.0

    def problems(self) -> Iterator[Problem]:
        """See `PolicyConfig`. Those of the common fields."""
        if self.stage not in STAGES:
            yield Problem("stage", repr(self.stage), f"it must be one of {', '.join(STAGES)}")
        if not 1 <= self.target_compression_ratio < math.inf:
            obstacle = "it must be at least 1, and finite: it is tokens per slot"
            yield Problem("target_compression_ratio", self.target_compression_ratio, obstacle)
        if not 0 < self.temperature < math.inf:
            obstacle = "it must be greater than 0, and finite. The published value is 0.1"
            yield Problem("temperature", self.temperature, obstacle)
        if not 0 <= self.loss_weight < math.inf:
            yield Problem("loss_weight", self.loss_weight, "it must be at least 0, and finite")

    def obstacle_to_leaving(self, after: PolicyConfig) -> str | None:
        """A model with decisions is not the same function without them, its channel being in use."""
        if not self.decides or (isinstance(after, type(self)) and after.decides):
            return None
        return (
            f"its {self.channel} now decides what is {self.effect}. Choose the policy {self.name} with stage "
            "retrofit or finetune, or load an earlier checkpoint"
        )

    def obstacle_to_converting(self, before: PolicyConfig) -> str | None:
        """Training begins with stage zero_out, which changes no weights."""
        if not self.decides or isinstance(before, type(self)):
            return None
        return (
            f"stage is {self.stage}, but the model {self.without}: its {self.channel} is in use, so "
            "decisions would be arbitrary. Set the stage to zero_out and train that stage first"
        )

"""Stages of policies that learn to decide, over time: how fast a channel that decisions are read from fades,
how much compression is asked for, and what missing it costs. `StagedPolicy` is what such policies have in
common."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lckv.policies.base import ChannelRows, KVPolicy
from lckv.policies.binary_decisions import draw_noise
from lckv.policies.config import PolicyConfig
from lckv.policies.staged_config import StagedConfig

FADE_END = 0.8
"""Share of stage zero_out after which the borrowed channel is 0."""


def fade(progress: float) -> float:
    """Factor of the borrowed channel in stage zero_out, at a share `progress` of it."""
    return max(0.0, 1.0 - progress / FADE_END)


def compression_ratio(
    target: float, stage: str, progress: float, *, initial: float = 1.0, ramp: float = 1.0
) -> float:
    """Tokens per slot that are asked for at a share `progress` of the stage: in retrofit from `initial` to
    `target`, which is reached after a share `ramp` of the stage; in finetune `target`; else 1."""
    if stage == "retrofit":
        return initial + (target - initial) * min(1.0, progress / ramp)
    return target if stage == "finetune" else 1.0


def hinge_loss(rate: Tensor, ratio: float) -> Tensor:
    """max(0, 1 - 1/CR - m) of each share m of tokens that need no slot:
    what is missing to the share that `ratio` stands for."""
    return torch.relu(1.0 - 1.0 / ratio - rate)


def ratio_of_rate(rate: float) -> float:
    """Tokens per slot where a share `rate` of tokens needs none."""
    return 1.0 / max(1.0 - rate, 1e-9)


class StagedPolicy(KVPolicy):
    """A policy whose decisions are read from a channel that is freed first. Its first statistic is the share
    of tokens that need no slot."""

    config: StagedConfig
    heads: ClassVar[str]
    """Where the channel is, for people: the last one of ..."""

    @abstractmethod
    def decision_rows(self, rows: ChannelRows) -> Iterator[Tensor]:
        """Views of the weights (and biases) that make the channel."""

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Noise of the decisions; None where there are none."""
        return draw_noise(shape, seeds, device) if self.config.decides else None

    def target(self, progress: float) -> float:
        """The compression ratio that is asked for at a share `progress` of training."""
        config = self.config
        return compression_ratio(
            config.target_compression_ratio,
            config.stage,
            progress,
            initial=config.initial_compression_ratio,
            ramp=config.ramp,
        )

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor | None:
        """Loss of each row for fewer tokens without a slot than the target asks for; None where nothing is
        decided."""
        if not self.config.decides:
            return None
        loss = self.config.loss_weight * hinge_loss(means[0], self.target(progress))
        return loss if loss.dim() == 1 else loss.mean(1)

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """The loss, and the compression ratios asked for and reached, in tokens per slot over all layers and
        heads."""
        if not self.config.decides:
            return {}
        reached = {"compression_ratio": ratio_of_rate(means[0].mean().item())}
        if progress is None:
            return reached
        return {f"{self.name}_loss": loss, "target_compression_ratio": self.target(progress), **reached}

    def obstacle_in_weights(self, rows: ChannelRows, before: PolicyConfig) -> str | None:
        """Decisions cannot begin in a channel that means something else."""
        config = self.config
        if not config.decides or (isinstance(before, type(config)) and before.decides):
            return None
        largest = max((row.abs().max().item() for row in self.decision_rows(rows)), default=0.0)
        if largest == 0:
            return None
        return (
            f"stage is {config.stage}, but the loaded weights use the {config.channel} (the last one of "
            f"{self.heads}; its largest weight is {largest:.3g}), so decisions would be arbitrary. Run stage "
            "zero_out first, to its end, and load what it saves"
        )

    @torch.no_grad()
    def end_stage(self, rows: ChannelRows) -> str | None:
        """The end of stage zero_out: the weights (and biases) of the channel become 0, which by then changes
        no output but through norms of heads."""
        if self.config.decides:
            return None
        for row in self.decision_rows(rows):
            row.zero_()
        return f"stage zero_out is over: the {self.config.channel} of {self.heads} is 0"

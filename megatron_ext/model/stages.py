"""What a pipeline stage gets in a visit of a micro-batch, and what it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lckv.policies.base import KeyValue
from lckv.sharing.journey import Visit
from lckv.sharing.plan import Step
from lckv.sharing.visiting import Kept


class StageKept(NamedTuple):
    """What stays on the stage where a group over several stages begins, for its next passes."""

    content: Kept[KeyValue]

    sums: Tensor | None
    """float32 [b, columns]: statistics of the layers below the group."""

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        kinds = self.content.available, self.content.lent
        pairs = [tensor for kind in kinds for pair in kind.values() for tensor in pair]
        return [self.content.start, *pairs, *([] if self.sums is None else [self.sums])]

    def leaves(self) -> "StageKept":
        """The same numbers; gradients of whatever is computed from them gather in `grad`."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        available, lent = (
            {layer: KeyValue(*map(leaf, pair)) for layer, pair in kind.items()}
            for kind in (self.content.available, self.content.lent)
        )
        return StageKept(
            Kept(leaf(self.content.start), available, lent), None if self.sums is None else leaf(self.sums)
        )


@dataclass(eq=False)
class StageNotes:
    """What a visit leaves on its stage."""

    kept: StageKept | None = None
    """For the further passes over the group that `Visit.keeps` names."""

    prepared: dict[int, KeyValue] = field(default_factory=dict)
    """For the first pass with gradient over the group that `Visit.prepares` names."""


@dataclass(frozen=True, eq=False)
class StageCall:
    """One visit of a micro-batch to a stage."""

    visit: Visit

    arrived: Tensor | None = None
    """What the visit before sent."""

    kept: StageKept | None = None
    """What `visit.takes` needs."""

    prepared: dict[int, KeyValue] | None = None
    """What `visit.prepared` needs."""

    notes: StageNotes = field(default_factory=StageNotes)
    """The visit writes there."""


def step_names(steps: Sequence[Step]) -> list[str]:
    """Of each step, such as "group 1 pass 0 without gradient": the groups of the stage count from 0."""
    groups = list(dict.fromkeys(step.group for step in steps))
    return [
        f"group {groups.index(step.group)} pass {step.number}"
        + ("" if step.requires_grad else " without gradient")
        for step in steps
    ]

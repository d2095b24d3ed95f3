"""Where optimizers count their steps, and that a checkpoint of one goes on under the other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.checkpointing.optimizer_state import place_step

TORCH = SimpleNamespace(optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
FUSED = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
"""No Adam of torch's, as Transformer Engine's and apex's."""


def saved(common: float | None = None, of_groups: int | None = None) -> dict[str, Any]:
    step = {} if of_groups is None else {"step": of_groups}
    state: dict[str, Any] = {0: {"exp_avg": torch.zeros(1)}}
    if common is not None:
        state["common_step"] = torch.tensor(common)
    return {"state": state, "param_groups": [{"params": [0], **step}, {"params": [], **step}]}


@pytest.mark.parametrize(
    ("state", "steps"),
    [(saved(common=7.0), 7), (saved(of_groups=7), 7), (saved(), 0)],
    ids=["torch's", "fused", "none yet"],
)
def test_a_fused_optimizer_counts_in_its_groups(state: dict[str, Any], steps: int) -> None:
    place_step(state, FUSED)
    assert [group["step"] for group in state["param_groups"]] == [steps, steps]
    assert state["state"].keys() == {0}  # a number of every parameter is what a fused one does not take


@pytest.mark.parametrize(
    ("state", "steps"),
    [(saved(common=7.0), 7), (saved(of_groups=7), 7), (saved(), 0)],
    ids=["torch's", "fused", "none yet"],
)
def test_torchs_counts_for_every_parameter(state: dict[str, Any], steps: int) -> None:
    place_step(state, TORCH)
    assert state["state"]["common_step"] == steps

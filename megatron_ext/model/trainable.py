"""Which parameters of a model are trained.

What is not trained has no gradient buffer and no optimizer state, since Megatron makes both for parameters
that require gradients; weight decay does not reach it; checkpoints hold it as every weight."""

from collections.abc import Iterator
from typing import Literal

import torch

from megatron_ext.model.gpt import SharedKVGPTModel

Trainable = Literal["all", "policy"]


def choose_trainable(stage: SharedKVGPTModel, trainable: Trainable) -> None:
    """Freeze what is not trained. Before the stage is wrapped."""
    if trainable == "all":
        return
    stage.requires_grad_(False)
    stage.input_is_frozen = True
    for parameter in trained_parameters(stage, trainable):
        parameter.requires_grad_()


def trained_parameters(stage: SharedKVGPTModel, trainable: Trainable) -> Iterator[torch.nn.Parameter]:
    """Of the stage all parameters, or those of the KV policy's own alone."""
    if trainable == "all":
        yield from stage.parameters()
        return
    for layer in stage.decoder.layers:
        yield from layer.self_attention.policy_parameters()

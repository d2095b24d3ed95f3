"""Which parameters of a model are trained.

What is not trained has no gradient buffer and no optimizer state, since Megatron makes both for parameters
that require gradients; weight decay does not reach it; checkpoints hold it as every weight."""

from typing import Literal

from megatron_ext.model.gpt import SharedKVGPTModel


def choose_trainable(stage: SharedKVGPTModel, trainable: Literal["all", "policy"]) -> None:
    """Of the stage all parameters, or those of the KV policy's own alone. Before it is wrapped."""
    if trainable == "all":
        return
    stage.requires_grad_(False)
    stage.input_is_frozen = True
    for layer in stage.decoder.layers:
        for parameter in layer.self_attention.policy_parameters():
            parameter.requires_grad_()

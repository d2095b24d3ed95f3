"""One step of a family of maps is that of a model with the drawn map alone: losses and gradients, on every
layout, and zeros where the map uses no weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerTypes
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.policy_statistics import PolicyInputs
from tests.megatron_ext.model.stages import MERGING, MODEL, VOCAB, draw_tokens, make_stage, positions_of
from tests.ranks import run_on_ranks

ROUTING = CompressionConfig(layer_types="0_0|1_1|2_2|3_3|4_4|5")
FAMILIES = {
    "routing": (ROUTING, ("0_0_0_0_0_0", "0_0_2_2_2_5", "0_1_2_3_4_5")),
    "cyclic": (
        CompressionConfig(layer_types="0_1|4_2|4_3|4_4_5", forward_passes=1, backward_passes=2),
        ("0_4_4_4_4_5", "0_1_4_3_4_5", "0_1_2_3_4_5"),
    ),
    "windows": (
        CompressionConfig(layer_types=("0_1s_2_2_4s_4", "0_1_1s_3_3_3"), sliding_window=5),
        ("0_1s_2_2_4s_4", "0_1_1s_3_3_3"),
    ),
    "a layer without weights": (
        CompressionConfig(layer_types="0_0_0|2_2|3_4_4|5"), ("0_0_0_0_4_4", "0_0_2_3_4_5"),
    ),
    "merging": (replace(ROUTING, policy=MERGING), ("0_0_0_3_3_3", "0_1_2_3_4_5")),
}  # fmt: skip


def step(stage: SharedKVGPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and gradients by name."""
    tokens = draw_tokens(2, 9)
    stage.zero_grad()
    losses, report = stage(
        tokens, positions_of(tokens), tokens.roll(-1, 1), policy=PolicyInputs(row_seeds=(3, 4))
    )
    total = losses.total
    if report.auxiliary_loss is not None:
        total = total + report.auxiliary_loss.sum()
    total.backward()
    return losses.losses, {name: parameter.grad for name, parameter in stage.named_parameters()}


def alone(stage: SharedKVGPTModel, compression: CompressionConfig, **model: Any) -> SharedKVGPTModel:
    """A model with one map and the weights that it needs of `stage`."""
    train = TrainConfig(precision="fp32")
    single = build_stage(replace(MODEL, **model), compression, ParallelConfig(), train, vocab_size=VOCAB)
    stored = dict(stage.named_parameters())
    with torch.no_grad():
        for name, parameter in single.named_parameters():
            source = stored.get(name)
            if source is None:
                source = query_rows(stored[name.replace("linear_q.", "linear_qkv.")])
            parameter.copy_(source)
    return single


def query_rows(fused: Tensor) -> Tensor:
    """2 KV heads of 2 query heads, D 8: the last two of four of each are key and value."""
    return fused.unflatten(0, (2, 4, 8))[:, :2].flatten(0, 2)


def compare(family: CompressionConfig, maps: tuple[str, ...], **model: Any) -> None:
    """On one rank."""
    stage = make_stage(family, **model)
    for text in [*maps, maps[0]]:
        compression = family.with_map(LayerTypes.parse(text, 6))
        stage.decoder.take(compression)
        losses, gradients = step(stage)
        expected_losses, expected = step(alone(stage, compression, **model))
        torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            assert gradient is not None, f"{name} of {text} has no gradient"
            if name in expected:
                torch.testing.assert_close(gradient, expected[name], rtol=2e-5, atol=2e-6)
            elif "linear_qkv" in name:
                queries = expected[name.replace("linear_qkv", "linear_q")]
                torch.testing.assert_close(query_rows(gradient), queries, rtol=2e-5, atol=2e-6)
                assert not gradient.unflatten(0, (2, 4, 8))[:, 2:].any()
            else:
                assert "k_layernorm" in name and not gradient.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_that_of_the_map_alone(name: str) -> None:
    norms = {"qk_layernorm": True, "add_qkv_bias": True} if name in ("routing", "cyclic") else {}
    run_on_ranks(1, compare_norms, name, norms)


def compare_norms(name: str, norms: dict[str, bool]) -> None:
    family, maps = FAMILIES[name]
    compare(family, maps, **norms)

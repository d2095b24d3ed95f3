"""Settings: what they say of the policy, and what is refused."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from lckv.attention.key_bias import KeyBias
from lckv.config import CompressionConfig
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dms.config import DMSConfig

FADING = DMSConfig()
EVICTING = replace(FADING, stage="finetune")


def test_published_defaults() -> None:
    assert (FADING.window, FADING.decision_scale, FADING.initial_decision_offset) == (512, 100.0, 5.0)
    assert (FADING.target_compression_ratio, FADING.temperature, FADING.stage) == (8.0, 0.1, "zero_out")
    assert CompressionConfig.from_dict({"policy": {"name": "dms", "window": 7}}).policy == replace(
        FADING, window=7
    )


def test_what_follows_for_attention_and_caches() -> None:
    assert FADING.traits.key_bias is None and FADING.traits.token_wise
    assert EVICTING.traits.key_bias == KeyBias(513, 8)
    assert not EVICTING.traits.keeps_every_token and not EVICTING.traits.windows
    short = replace(EVICTING, window=7)
    assert [short.slots(tokens, 4.0) for tokens in (3, 8, 9, 12, 13)] == [3, 8, 9, 9, 10]
    assert [FADING.slots(9, 1.0), FADING.state_numbers(64), EVICTING.state_numbers(64)] == [9, 0, 512]
    assert [FADING.compression_ratio, EVICTING.compression_ratio] == [1.0, 8.0]
    assert EVICTING.describe() == "dms, stage finetune: target 8 tokens per slot, window 512"
    assert "more than 512 tokens old" in EVICTING.card() and "arXiv:2506.05345" in EVICTING.references[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "early"}, "stage is 'early'; it must be one of zero_out, retrofit, finetune."),
        (
            {"target_compression_ratio": 0.5},
            "target_compression_ratio is 0.5; it must be at least 1, and finite: it is",
        ),
        ({"initial_compression_ratio": 9.0}, "initial_compression_ratio is 9.0; it must be from 1 to target"),
        ({"ramp": 0.0}, "ramp is 0.0; it must be above 0 and at most 1"),
        ({"ramp": float("nan")}, "ramp is nan; it must be above 0 and at most 1"),
        ({"window": 0}, "window is 0; it must be at least 1 token. The published value is 512."),
        (
            {"decision_scale": 0.0},
            "decision_scale is 0.0; it must be greater than 0, and finite. The published value is 100",
        ),
        ({"decision_scale": float("inf")}, "decision_scale is inf; it must be greater than 0, and finite."),
        ({"initial_decision_offset": -1.0}, "initial_decision_offset is -1.0; it must be greater than 0, or"),
        (
            {"temperature": 0.0},
            "temperature is 0.0; it must be greater than 0, and finite. The published value is 0.1",
        ),
        ({"loss_weight": -1.0}, "loss_weight is -1.0; it must be at least 0, and finite."),
        (
            {"decision_source": "key"},
            "decision_source is 'key'; it must be one of borrowed_channel, adapter",
        ),
        ({"decisions_per": "row"}, "decisions_per is 'row'; it must be one of kv_head, layer"),
        ({"decision_source": "adapter"}, "stage is zero_out; it frees the borrowed channel, and decision_"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    (problem,) = replace(FADING, **changes).problems()
    assert str(problem).startswith(said)


def test_an_adapter_needs_no_channel_and_stays() -> None:
    adapting = replace(EVICTING, stage="retrofit", decision_source="adapter")
    assert [*adapting.problems()] == []
    assert adapting.obstacle_to_converting(DenseConfig()) is None
    assert adapting.build().obstacle_in_weights(lambda kind, channel: 1 / 0, DenseConfig()) is None
    assert adapting.obstacle_to_leaving(replace(adapting, stage="finetune")) is None
    assert "its adapter now decides what is dropped" in str(adapting.obstacle_to_leaving(DenseConfig()))
    assert "decision_source is adapter, which" in str(adapting.obstacle_to_leaving(EVICTING))
    layers = replace(adapting, decisions_per="layer")
    assert "decisions_per is layer, which" in str(layers.obstacle_to_leaving(adapting))
    assert layers.describe().endswith("decisions of an adapter, one for all heads of a layer")
    assert "The first KV head of each layer decides" in layers.card()


@pytest.mark.parametrize("source", ["borrowed_channel", "adapter"])
def test_one_head_decides_for_all(source: Literal["borrowed_channel", "adapter"]) -> None:
    policy = replace(EVICTING, decision_source=source, decisions_per="layer").build()
    noise = policy.draw_noise((5, 2, 4), [3, 4], torch.device("cpu"))
    assert noise is not None and torch.equal(noise, noise[..., :1].expand(5, 2, 4))
    assert (noise[:, 0] != noise[:, 1]).all()
    assert policy.traits.mixes_heads == (source == "borrowed_channel")


def test_the_order_of_stages() -> None:
    assert FADING.obstacle_to_converting(DenseConfig()) is None
    assert "Set the stage to zero_out" in str(EVICTING.obstacle_to_converting(DenseConfig()))
    assert EVICTING.obstacle_to_converting(FADING) is None
    assert FADING.obstacle_to_leaving(DenseConfig()) is None
    assert EVICTING.obstacle_to_leaving(replace(EVICTING, stage="retrofit")) is None
    for after in (DenseConfig(), FADING):
        assert "Choose the policy dms with stage retrofit" in str(EVICTING.obstacle_to_leaving(after))

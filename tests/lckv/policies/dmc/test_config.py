"""Odd settings are refused by name."""

import math
from dataclasses import replace

import pytest

from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy


def test_the_defaults_are_the_published_ones_and_have_no_problems():
    config = DMCConfig()
    assert not [*config.problems()]
    assert (config.initial_decision_bias, config.temperature, config.window, config.loss_weight) == (
        5.0,
        0.1,
        12,
        1.0,
    )
    odd = replace(config, stage="finetune", window=None, target_compression_ratio=1.0, loss_weight=0.0)
    assert not [*odd.problems()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "fintune"}, "stage is 'fintune'; it must be one of zero_out, retrofit, finetune."),
        ({"target_compression_ratio": 0.5}, "target_compression_ratio is 0.5; it must be at least 1"),
        ({"target_compression_ratio": math.nan}, "target_compression_ratio is nan; it must be at least 1"),
        ({"initial_decision_bias": 0.0}, "initial_decision_bias is 0.0; it must be greater than 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0, and finite."),
        ({"temperature": -1.0}, "temperature is -1.0; it must be greater than 0"),
        ({"window": 0}, "window is 0; it must be at least 1 token, or null for no window."),
        ({"eps": 0.0}, "eps is 0.0; it must be greater than 0, and finite, or null"),
        ({"loss_weight": -1.0}, "loss_weight is -1.0; it must be at least 0, and finite."),
    ],
)
def test_odd_settings_are_named(change, message):
    (problem,) = replace(DMCConfig(), **change).problems()
    assert str(problem).startswith(message)


def test_all_problems_are_reported_and_reach_the_compression_section():
    policy = DMCConfig(window=0, temperature=0.0)
    problems = CompressionConfig(policy=policy).problems(4)
    assert problems == [problem.under("policy") for problem in policy.problems()]
    assert [problem.field for problem in problems] == ["policy.temperature", "policy.window"]


def test_sliding_windows_are_refused():
    compression = CompressionConfig(
        layer_types="0s_1s_2_2", sliding_window=8, policy=DMCConfig(stage="retrofit")
    )
    (problem,) = compression.problems(4)
    assert str(problem).startswith(
        "sliding_window is 8; the policy dmc cannot live with sliding windows: remove"
    )
    assert "the 's' in layer_types" in str(problem)


def test_the_config_builds_the_policy():
    config = DMCConfig(stage="retrofit")
    policy = config.build()
    assert isinstance(policy, DMCPolicy)
    assert (policy.name, policy.config) == ("dmc", config)

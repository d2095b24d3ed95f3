"""Each difference between the versions of megatron-core, on the version that is installed."""

import inspect
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.config import OptimizerConfig
from megatron_ext.mcore import name_argument, start_precision_aware_state
from megatron_ext.model.attention import SharedKVAttention
from megatron_ext.model.build import build_stage
from megatron_ext.parallel.process_groups import initialize
from tests.megatron_ext.training.runs import logged_to, series, tiny_run, train
from tests.ranks import run_on_ranks
from tests.thinning import thinned


def test_a_layer_names_its_attention_only_where_attention_takes_a_name() -> None:
    layer, attention = (inspect.signature(owner).parameters.keys() for owner in (TransformerLayer, Attention))
    assert ("name" in layer) == ("name" in attention)
    assert "name" in inspect.signature(SharedKVAttention).parameters
    assert name_argument(None) == {}
    assert name_argument("layer.self_attention") == {"name": "layer.self_attention"}


def _build_layers() -> tuple[list[bool], list[str]]:
    """Whether each layer's MLP is Megatron's, and what Megatron remarks on building them."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    megatron = logging.getLogger("megatron.core")
    megatron.addHandler(handler)
    try:
        run = tiny_run()
        initialize(run.parallel, run.train.seed)
        stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=97)
    finally:
        megatron.removeHandler(handler)
    return [type(layer.mlp) is MLP for layer in stage.decoder.layers], messages


def test_layers_have_megatrons_mlp_without_a_remark() -> None:
    ((are_mlps, messages),) = run_on_ranks(1, _build_layers)
    assert are_mlps == [True] * 4
    assert messages == []


@pytest.mark.parametrize(
    ("precision", "distributed"), [("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)]
)
def test_a_resumed_run_has_the_learning_rates_of_its_own_settings(
    tmp_path: Path, precision: str, distributed: bool
) -> None:
    options = {"train": {"precision": precision}, "parallel": {"use_distributed_optimizer": distributed}}
    rates = {"optimizer": {"lr": 1e-3, "min_lr": 1e-4}}
    first = tiny_run(**options, checkpoint={"save": str(tmp_path / "run"), "save_interval": 3})
    run_on_ranks(1, train, first)
    straight = tiny_run(**options, **rates)
    run_on_ranks(1, train, logged_to(straight, tmp_path / "straight.jsonl"))
    resumed = tiny_run(**options, **rates, checkpoint={"load": str(tmp_path / "run" / "iter_0000003")})
    run_on_ranks(1, train, logged_to(resumed, tmp_path / "resumed.jsonl"))
    name = "learning_rate"
    assert series(tmp_path / "resumed.jsonl", name) == series(tmp_path / "straight.jsonl", name)[3:]


CHANGED: dict[str, dict[str, Any]] = {
    "lr": {"lr": 1e-3},
    "min_lr": {"min_lr": 5e-3},
    "lr_decay_style": {"lr_decay_style": "constant"},
    "lr_warmup_iters": {"lr_warmup_iters": 5},
    "lr_decay_iters": {"lr_decay_iters": 20},
    "lr_wsd_decay_iters": {"lr_wsd_decay_iters": 4},
    "lr_wsd_decay_style": {"lr_wsd_decay_style": "exponential"},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_eps": {"adam_eps": 1e-2},
    "clip_grad": {"clip_grad": 1e-2},
}
"""Another value of each field than that of the first run."""
OF_TRANSFORMER_ENGINE = [
    "use_precision_aware_optimizer",
    "main_params_dtype",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
]
"""Where things are kept, and in which dtypes; only Transformer Engine can (training/test_options.py)."""


def test_every_field_of_the_optimizer_is_tried() -> None:
    assert [*CHANGED, *OF_TRANSFORMER_ENGINE] == [field.name for field in fields(OptimizerConfig)]


class AdamOf20:
    """Transformer Engine's, as far as its state goes."""

    def __init__(self) -> None:
        self.stepped, self.fresh = torch.zeros(1), torch.zeros(1)
        self.param_groups = [{"params": [self.stepped, self.fresh]}]
        self.state: dict[Any, dict[str, Any]] = {self.stepped: {"exp_avg": 1}, self.fresh: {}}

    def initialize_state(self, param: torch.Tensor) -> None:
        self.state[param] = {"exp_avg": 0}


class AdamOf21(AdamOf20):
    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
        self.state[param] = {"exp_avg": 0, "whole": not store_param_remainders}


@pytest.mark.parametrize(
    ("adam", "expected"), [(AdamOf20, {"exp_avg": 0}), (AdamOf21, {"exp_avg": 0, "whole": True})]
)
def test_the_state_of_transformer_engines_adam_begins(adam: type, expected: dict[str, Any]) -> None:
    optimizer = adam()
    start_precision_aware_state(optimizer)
    assert optimizer.state == {optimizer.stepped: {"exp_avg": 1}, optimizer.fresh: expected}


@pytest.mark.parametrize("distributed", thinned([True, False], 2), ids=["distributed", "plain"])
def test_every_changed_setting_of_the_optimizer_counts_on_resuming(tmp_path: Path, distributed: bool) -> None:
    """The steps after resuming differ from those without the change, for every field by itself."""
    layout = {"parallel": {"use_distributed_optimizer": distributed}}
    styles: dict[str, dict[str, Any]] = {
        "cosine": {}, "WSD": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3},
    }  # fmt: skip
    for style, settings in styles.items():
        saving = {"save": str(tmp_path / style), "save_interval": 3}
        run_on_ranks(1, train, tiny_run(**layout, optimizer=settings, checkpoint=saving))

    def losses(style: str, change: dict[str, Any]) -> list[float]:
        loading = {"load": str(tmp_path / style / "iter_0000003")}
        run = tiny_run(**layout, optimizer={**styles[style], **change}, checkpoint=loading)
        metrics = tmp_path / "-".join((style, *change, "losses"))
        run_on_ranks(1, train, logged_to(run, metrics))
        return series(metrics, "lm_loss")

    unchanged = {style: losses(style, {}) for style in styles}
    style_of = {field: "WSD" if field.startswith("lr_wsd") else "cosine" for field in CHANGED}
    same = [
        field
        for field, change in CHANGED.items()
        if losses(style_of[field], change) == unchanged[style_of[field]]
    ]
    assert same == []

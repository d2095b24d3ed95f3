"""Tiny runs on mock data for tests of the training program."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.command_line import config_from_dict
from megatron_ext.config import RunConfig
from megatron_ext.parallel.process_groups import initialize

SETTINGS: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 97,
    },
    "train": {
        "train_iters": 6,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "seq_length": 24,
        "precision": "fp32",
    },
    "optimizer": {"lr": 1e-2, "lr_warmup_iters": 2},
    "data": {"mock": True, "num_workers": 0},
    "logging": {"progress_bar": False},
}


def tiny_run(**sections: dict[str, Any]) -> RunConfig:
    """SETTINGS with some fields changed."""
    merged = {name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in {*SETTINGS, *sections}}
    return config_from_dict(merged)


def train(run: RunConfig) -> int:
    """On every rank: run it; returns the iteration reached."""
    import torch.distributed as dist

    from checkpoints_conversion.for_training import open_for_training
    from megatron_ext.training.loop import fit
    from megatron_ext.validation.run import validate

    validate(run, dist.get_world_size())
    initialize(run.parallel, run.train.seed)
    return fit(run, open_for_training).iteration


def messages(run: RunConfig) -> list[str]:
    """On every rank: run it; returns what it says in its log."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, logger = Listener(logging.INFO), logging.getLogger("megatron_ext")
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        train(run)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    return said


def logged_to(run: RunConfig, path: Path) -> RunConfig:
    return replace(run, logging=replace(run.logging, metrics_file=str(path)))


def reports(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def series(path: Path, name: str) -> list[float]:
    return [report[name] for report in reports(path) if name in report]

"""How many passes the steps of a run have, and runs with a first guess: on ranks, and when they go on."""

import math
from pathlib import Path
from typing import Any

import pytest

from lckv.config import CompressionConfig
from megatron_ext.model.block import SharedKVBlock
from megatron_ext.training.passes import compression_of_step
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.megatron_ext.training.test_loop import check_resumption, parallel
from tests.ranks import run_on_ranks

GUESS = {"layer_types": "1_1_2_3", "forward_passes": 3, "backward_passes": 1, "first_guess": True}
RANDOM = {"forward_passes_schedule": "random", "least_forward_passes": 0}


def passes_taken(run: Any) -> list[int]:
    """On every rank: run it; what its steps and evaluations were told."""
    told: list[int] = []
    take = SharedKVBlock.take

    def noted(block: SharedKVBlock, compression: CompressionConfig) -> None:
        told.append(compression.forward_passes)
        take(block, compression)
        assert sum(not step.requires_grad for step in block.plan) == compression.forward_passes

    SharedKVBlock.take = noted
    try:
        train(run)
    finally:
        SharedKVBlock.take = take
    return told


def test_every_rank_takes_the_passes_of_the_step_and_evaluations_all() -> None:
    lckv = {"layer_types": "0_2_2_3", "forward_passes": 3, "backward_passes": 1}
    evaluation = {"eval_interval": 3, "eval_iters": 1}
    run = tiny_run(compression=lckv, train={**RANDOM, **evaluation}, parallel=parallel(1, 2))
    drawn = [compression_of_step(run.compression, run.train, 4, step).forward_passes for step in range(6)]
    assert len(set(drawn)) > 1
    first, second = run_on_ranks(2, passes_taken, run)
    assert first == second == [3, *drawn[:3], 3, *drawn[3:], 3]


def test_losses_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    losses = {}
    for name, ranks, layout in (("one", 1, {}), ("stages", 2, parallel(1, 2)), ("tp", 2, parallel(2))):
        run = tiny_run(compression=GUESS, train=RANDOM, parallel=layout)
        run_on_ranks(ranks, train, logged_to(run, tmp_path / f"{name}.jsonl"))
        losses[name] = {
            key: series(tmp_path / f"{name}.jsonl", key) for key in ("lm_loss", "first_guess_error")
        }
    for name in ("stages", "tp"):
        for key, expected in losses["one"].items():
            assert losses[name][key] == pytest.approx(expected, rel=2e-5), (name, key)
    errors = losses["one"]["first_guess_error"]
    assert errors[0] == 1.0, "guesses begin at zero"
    assert errors[-1] < errors[0]
    assert losses["one"]["lm_loss"][0] < math.log(97) + 0.5
    assert "first_guess_error/layer_1/head_0" in reports(tmp_path / "one.jsonl")[0]


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    settings = {"compression": GUESS, "train": {"precision": "bf16", **RANDOM}}
    check_resumption(tmp_path, 2, {**settings, "parallel": parallel(2, sequence_parallel=True)}, {})

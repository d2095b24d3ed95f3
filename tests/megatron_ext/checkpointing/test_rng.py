"""Random states: all generators come back bit for bit, and re-seeding depends on seed, iteration and
stage."""

import random
from typing import Any

import numpy as np
import safetensors.torch
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.checkpointing.rng import reseed, restore_rng_states, rng_states
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks


def _gauss() -> float:
    return np.random.standard_normal()  # noqa: NPY002


def _draw() -> list[Any]:
    numbers: list[Any] = [
        random.random(),
        random.gauss(0, 1),
        np.random.random_sample(),  # noqa: NPY002
        _gauss(),
        torch.rand(()).item(),
    ]
    for name in sorted(get_cuda_rng_tracker().get_states()):
        with get_cuda_rng_tracker().fork(name):
            numbers.append(torch.rand(()).item())
    return numbers


def _round_trip() -> None:
    initialize(ParallelConfig(), seed=3)
    for extra in range(
        3
    ):  # the second Gaussian of a pair is kept by the generator: save with and without one
        random.gauss(0, 1)
        np.random.standard_normal(1 + extra)  # noqa: NPY002
        saved = safetensors.torch.load(safetensors.torch.save(rng_states()))
        expected = [_draw() for _ in range(3)]
        assert expected[0] != expected[1]
        restore_rng_states(saved)
        assert [_draw() for _ in range(3)] == expected


def test_states_come_back_bit_for_bit() -> None:
    run_on_ranks(1, _round_trip)


def _numbers_of_seeds(pipeline: int) -> list[list[Any]]:
    initialize(ParallelConfig(pipeline_model_parallel_size=pipeline), seed=3)
    numbers = []
    for seed, iteration in ((3, 10), (3, 11), (4, 10), (3, 10)):
        reseed(seed, iteration)
        numbers.append(_draw())
    return numbers


def test_reseeding_depends_on_seed_iteration_and_stage() -> None:
    first, second = run_on_ranks(2, _numbers_of_seeds, 2)
    for numbers in (first, second):
        assert numbers[0] == numbers[3]
        assert len({str(draw) for draw in numbers}) == 3
    assert first[0] != second[0]
    together = run_on_ranks(2, _numbers_of_seeds, 1)
    assert together[0] == together[1], (
        "data-parallel ranks of one stage start alike, as Megatron's seeding has it"
    )

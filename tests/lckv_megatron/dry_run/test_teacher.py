"""A run that distils, and one with frozen weights: the plan's formulas say what its dry run says, which
test_measured.py compares with real steps."""

from dataclasses import replace

import pytest

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.report import teacher_lines
from lckv_megatron.dry_run.search import candidates
from lckv_megatron.dry_run.stages import first_ranks, simulate_ranks
from lckv_megatron.planning.memory import rank_memory, stage_lines
from lckv_megatron.planning.plan import Plan
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.restoring.description import Description
from tests.lckv_megatron.dry_run.measured import ADAPTER

VOCAB = 4000
BASE = (
    "--model.num_layers 4 --model.hidden_size 256 --model.num_query_groups 2 --model.num_attention_heads 8 "
    f"--model.vocab_size {VOCAB} --model.cross_entropy_chunk_size 256 --data.mock true "
    "--train.precision bf16 --train.seq_length 1024 --train.global_batch_size 16"
).split()
TWO_STAGES = ("--parallel.pipeline_model_parallel_size", "2")
WIDE = ("--model.hidden_size", "512")
TOLERANCE = 0.05


def run_of(*options: str) -> RunConfig:
    return parse_run_config([*BASE, *options])


def plan_of(student: tuple[str, ...], teacher: tuple[str, ...], layout: tuple[str, ...] = ()) -> Plan:
    run = run_of("--train.distillation.teacher", "teacher", *student, *layout)
    described = Description(run_of(*teacher, *layout), VOCAB)
    world_size = run.parallel.pipeline_model_parallel_size
    return Plan(run, world_size, VOCAB, utilisation=1.0, teacher=described)


@pytest.mark.parametrize(
    ("student", "teacher", "layout"),
    [
        (("--compression.layer_types", "0_0_2_2"), WIDE, TWO_STAGES),
        (("--train.recompute_granularity", "full"), WIDE, ()),
        (tuple(ADAPTER), (), TWO_STAGES),
    ],
    ids=["16 micro-batches wait", "one stage", "adapter"],
)
def test_the_formulas_are_the_dry_runs(
    student: tuple[str, ...], teacher: tuple[str, ...], layout: tuple[str, ...]
) -> None:
    plan = plan_of(student, teacher, layout)
    for rank in simulate_ranks(plan, first_ranks(plan), Machine()):
        needed = rank_memory(plan, rank.stage)
        assert needed.total == pytest.approx(rank.memory.peak_bytes, rel=TOLERANCE)
        weights = rank.memory.peak["parameters"]
        assert rank.teacher is not None and weights > rank.teacher.own
        is_frozen = plan.run.train.trainable == "policy"
        assert (rank.teacher.own == 0, rank.teacher.shared > 0) == (is_frozen, is_frozen)
        assert any("are frozen ones of the model" in line for line in teacher_lines([rank]))
        said = any("are the student's frozen ones and in memory once" in line for line in stage_lines(plan))
        assert said == is_frozen


def test_weights_of_another_shape_or_dtype_are_not_shared() -> None:
    plan = plan_of(tuple(ADAPTER), ())
    shared = rank_memory(plan, 0).state
    others = (WIDE, ("--train.precision", "fp32"), ("--compression.layer_types", "0_0_2_3"))
    for other in others:
        assert rank_memory(plan_of(tuple(ADAPTER), other), 0).state > 1.9 * shared
    everything = replace(plan, run=replace(plan.run, train=replace(plan.run.train, trainable="all")))
    alone = replace(everything, teacher=None)
    own = plan.stages[0].per_rank - plan.stages[0].of_policy
    assert rank_memory(everything, 0).state == rank_memory(alone, 0).state + 2 * own


@pytest.mark.parametrize(("layers", "stages"), [("4", {1, 2}), ("3", {1})])
def test_layouts_that_the_teacher_does_not_fit_are_not_tried(layers: str, stages: set[int]) -> None:
    plan = replace(plan_of((), ("--model.num_layers", layers)), world_size=2)
    tried = candidates(plan, 1)
    assert {one.run.parallel.pipeline_model_parallel_size for one in tried} == stages

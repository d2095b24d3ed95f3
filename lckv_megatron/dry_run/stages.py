"""Ranks of a plan, dry run one after the other."""

import warnings
from collections.abc import Iterable

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.rank import RankRun, simulate
from lckv_megatron.planning.plan import Plan


def first_ranks(plan: Plan) -> list[int]:
    """The first rank of each pipeline stage."""
    stages = plan.run.parallel.pipeline_model_parallel_size
    return [stage * plan.world_size // stages for stage in range(stages)]


def simulate_ranks(
    plan: Plan, ranks: Iterable[int], machine: Machine, *, traced: bool = False
) -> list[RankRun]:
    """What each of `ranks` does in a step of the planned run; with its trace where `traced`.

    Raises ConfigError as `simulate` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Megatron tells what is not installed here, which a GPU's machine has
        return [
            simulate(
                plan.run,
                rank=rank,
                world_size=plan.world_size,
                vocab_size=plan.vocab_size,
                machine=machine,
                traced=traced,
                teacher=plan.teacher_here,
            )
            for rank in ranks
        ]

"""The dry run as options of `lckv-megatron plan`. Torch is not loaded before it is asked for."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lckv_megatron.dry_run.hardware import NETWORKS, Machine, rates_of
from lckv_megatron.planning.plan import Plan
from lckv_megatron.tables import table
from megatron_ext.errors import ConfigError
from megatron_ext.model.fit import usable_bytes

if TYPE_CHECKING:
    from lckv_megatron.dry_run.rank import RankRun


def add_options(parser: argparse.ArgumentParser) -> None:
    """--dry-run and what belongs to it."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="run steps of pretended ranks on tensors without numbers, and tell memory, collectives and time",
    )
    group.add_argument("--rank", type=int, help="only this rank (default: the first of each pipeline stage)")
    group.add_argument(
        "--network",
        choices=NETWORKS,
        help="between nodes of 8 GPUs: a card of so many Gbit/s for each GPU (default: "
        f"{Machine.network.name})",
    )
    group.add_argument(
        "--search",
        action="store_true",
        default=None,
        help="try other layouts on the same GPUs (TP, PP, micro-batch, recompute), minutes for large models",
    )
    group.add_argument(
        "--memory-plan",
        action="store_true",
        default=None,
        help="place the storages of a step with the least peak, and compare PyTorch's allocator",
    )
    group.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw memory over a step, as PNG; with --memory-plan where storages lie",
    )


def require_fitting(options: argparse.Namespace, world_size: int) -> None:
    """Refuse options that need --dry-run, or that it cannot serve.

    Raises ConfigError for them: without --dry-run, a GPU without rates, a rank or a folder that is not there.
    """
    for name in ("rank", "network", "search", "memory-plan", "picture"):
        if getattr(options, name.replace("-", "_")) is not None and not options.dry_run:
            raise ConfigError(f"--{name} is given without --dry-run; add --dry-run, or leave --{name} out.")
    if not options.dry_run:
        return
    rates_of(options.gpu)
    if options.picture is not None and not options.picture.parent.is_dir():
        raise ConfigError(
            f"--picture is {options.picture}; the folder {options.picture.parent} is not here: make it, or "
            "give another file."
        )
    if options.rank is not None and not 0 <= options.rank < world_size:
        raise ConfigError(
            f"--rank is {options.rank}; it must be from 0 to {world_size - 1}, as {world_size} processes are "
            "pretended (--world-size)."
        )


def report(plan: Plan, options: argparse.Namespace) -> Iterator[str]:
    """The dry run's tables, a line each; draws the picture too.

    Raises ConfigError where an attention backend cannot serve, the picture cannot be written, or the host's
    memory is too small.
    """
    family = plan.sizes.family
    if family.only is None:
        raise ConfigError(
            f"--dry-run runs steps with one map, and compression.layer_types is a family of maps, {family}: "
            f"give "
            f"--compression.layer_types MAP, such as {family.stored} (the most weights) or {family.first}."
        )
    from lckv_megatron.dry_run.report import describe
    from lckv_megatron.dry_run.stages import first_ranks, simulate_ranks

    peak = plan.peak_tflops
    assert peak is not None  # GPUs with rates have one
    machine = Machine(options.gpu, peak, NETWORKS.get(options.network, Machine.network))
    numbers = first_ranks(plan) if options.rank is None else [options.rank]
    ranks = simulate_ranks(plan, numbers, machine, traced=bool(options.memory_plan))
    if options.picture is not None and not options.memory_plan:
        from lckv_megatron.dry_run.picture import draw  # loads matplotlib: only pictures wait

        draw(ranks, usable_bytes(options.gpu.memory_bytes), options.picture)
    yield from describe(ranks, machine, plan.run.parallel.pipeline_model_parallel_size, model_flops(plan))
    if options.memory_plan:
        yield ""
        yield from _memory_plan(ranks, options.picture)
    if options.search:
        from lckv_megatron.dry_run.search import search, search_rows

        yield ""
        yield f"dry run: layouts of {plan.world_size} GPUs, the shortest step first; * is this run"
        yield from table(search_rows(plan, search(plan, machine), machine))


def model_flops(plan: Plan) -> float:
    """Of a step on each device: the method's own, without recomputation; of causal attention the half that is
    seen."""
    train = plan.run.train
    tokens = train.global_batch_size * train.seq_length
    return plan.sizes.cost.model_flops * tokens / plan.world_size


def _memory_plan(ranks: "Sequence[RankRun]", picture: Path | None) -> Iterator[str]:
    """Tables of where storages lie, and the picture."""
    from lckv_megatron.memory_plan import report
    from lckv_megatron.memory_plan.rank import plan_rank

    plans = [plan_rank(rank.rank, rank.trace) for rank in ranks if rank.trace is not None]
    if picture is not None:
        from lckv_megatron.memory_plan.picture import draw  # loads matplotlib: only pictures wait

        draw(plans, picture)
    yield from report.describe(plans)

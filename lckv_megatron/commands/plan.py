"""Says what a run would be before anything starts.

    lckv-megatron plan --config run.yaml --world-size 64 --section.key value ... [--compare [MAP ...]]

That is its map, size, cost, cache, layout and memory, whether that fits into a GPU, and its problems: what
cannot work, and what is not here. With --dry-run, steps of pretended ranks run besides, on tensors without
numbers. Takes the command line of pretrain_lckv.py. Needs no GPU, no processes and
no data. Exit status: 0, or 2 where there are problems.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from lckv.sharing.layer_types import LayerTypes
from lckv_megatron.dry_run import options as dry_run
from lckv_megatron.layouts import LAYOUTS, cache_bytes, compare
from lckv_megatron.planning.context import context_lines
from lckv_megatron.planning.inputs import (
    configs_in,
    epoch_lines,
    find_teacher,
    find_vocab_size,
    launched_processes,
    missing_paths,
)
from lckv_megatron.planning.memory import checkpoint_line, stage_lines, verdict_lines
from lckv_megatron.planning.plan import Plan
from lckv_megatron.tables import gib
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.command_line import exit_with, parse_run_config
from megatron_ext.errors import ConfigError
from megatron_ext.gpus import GPUS, Gpu, gpu_of
from megatron_ext.summary.lines import cost_lines, layout_lines, model_lines, picture
from megatron_ext.validation.run import problems, step_problems


def describe(plan: Plan) -> Iterator[str]:
    """The plan, a line each."""
    sizes = plan.sizes
    yield picture(sizes)
    yield ""
    yield from model_lines(sizes)
    yield _full_context(plan)
    yield from cost_lines(sizes)
    yield from _length(plan)
    yield from epoch_lines(plan.run, plan.tokens)
    yield from layout_lines(sizes)
    yield from context_lines(plan)
    yield from _idle(plan)
    yield checkpoint_line(plan)
    yield ""
    yield from stage_lines(plan)
    yield ""
    yield from verdict_lines(plan)


def _idle(plan: Plan) -> Iterator[str]:
    """How long pipeline stages wait."""
    stages, micro_batches = plan.run.parallel.pipeline_model_parallel_size, plan.sizes.micro_batches
    if plan.ticks is not None:
        yield (
            f"pipeline idle time    {100 * plan.ticks.bubble:.1f} % of a step, by the list of its work "
            f"(docs/pipelines.md): at most {plan.ticks.in_flight} micro-batches are in flight"
        )
    elif stages > 1:
        idle = (stages - 1) / (micro_batches + stages - 1)
        yield f"pipeline idle time    {100 * idle:.1f} % of a step: (PP - 1) / (micro-batches + PP - 1)"


def _full_context(plan: Plan) -> str:
    maps = (plan.layer_types, LayerTypes.plain(plan.run.model.num_layers))
    mine, plain = (
        cache_bytes(plan.shape, layer_types, window=plan.run.compression.sliding_window, tokens=plan.context)
        for layer_types in maps
    )
    return (
        f"  full context        {gib(mine)} for {plan.context:,} tokens, {plain / mine:.2f}x less than "
        f"{gib(plain)}"
    )


def _length(plan: Plan) -> Iterator[str]:
    yield (
        f"length                {plan.run.train.train_iters:,} steps, {plan.tokens:,} tokens, "
        f"{plan.sizes.cost.model_flops * plan.tokens:.2e} FLOPs"
    )
    seconds, peak = plan.seconds(), plan.peak_tflops
    if seconds is None:
        return
    time = f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 3600:,.1f} hours"
    reached = f"every device does {100 * plan.utilisation:g} % of {peak:g} TFLOP/s"
    if plan.mfu is not None:
        reached = f"the MFU is {100 * plan.mfu:g} % of {peak:g} TFLOP/s"
    hours = f"{seconds / 3600 * plan.world_size:,.0f} GPU-hours"
    yield f"time                  {time}, {hours} if {reached} (assumed, not measured)"


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return float(text)


def _gpu(text: str) -> Gpu:
    try:
        return gpu_of(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _own_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        "plan",
        __doc__,
        usage=(
            "%(prog)s [--config FILE ...] [--world-size N] [--gpu GPU] [--dry-run] [--compare [MAP ...]] "
            "[--section.key VALUE ...]"
        ),
        epilog="All settings: pretrain_lckv.py --help.",
    )
    parser.add_argument(
        "--world-size",
        type=positive,
        help=(
            "processes to pretend (default: those of the launch.sh beside the settings, else one replica, "
            "TP x PP x CP)"
        ),
    )
    parser.add_argument(
        "--gpu",
        type=_gpu,
        default="H100",
        help=f"for which memory and time are told: {', '.join(GPUS)}, or a size such as 48GiB (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="MAP",
        help=(
            "show the model with other maps instead: strings as in compression.layer_types, or names "
            "(default: all) of "
        )
        + ", ".join(layout.name.split()[0] for layout in LAYOUTS),
    )
    dry_run.add_options(parser)
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--utilisation",
        type=_share,
        default=0.4,
        help=(
            "share of the peak (logging.peak_tflops, else that of --gpu) assumed for the time, recomputation "
            "counted as work (default: %(default)s)"
        ),
    )
    speed.add_argument(
        "--mfu", type=_share, help="the same, but only the model's own operations count as work"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options, rest = _own_parser().parse_known_args(argv)
    run = parse_run_config(rest)
    launched = launched_processes(configs_in(rest))
    world_size = options.world_size or launched or max(1, run.parallel.replica_size)
    try:
        dry_run.require_fitting(options, world_size)
    except ConfigError as error:
        exit_with(str(error))
    sentences = problems(run, world_size)
    vocab_size = 0
    if not step_problems(run, world_size):
        try:
            vocab_size = find_vocab_size(run)
        except ConfigError as error:
            sentences += [problem for problem in str(error).splitlines() if problem not in sentences]
    sentences += missing_paths(run)
    if vocab_size:
        teacher = None
        try:
            teacher = find_teacher(run, world_size, vocab_size)
        except ConfigError as error:
            sentences += [problem for problem in str(error).splitlines() if problem not in sentences]
        plan = Plan(run, world_size, vocab_size, options.utilisation, options.gpu, options.mfu, teacher)
        try:
            print(
                "\n".join(
                    describe(plan)
                    if options.compare is None
                    else compare(plan.shape, run.compression, plan.context, options.compare)
                )
            )
        except ValueError as error:
            exit_with(f"--compare: {error}")
        if options.dry_run:
            try:
                print("\n" + "\n".join(dry_run.report(plan, options)))
            except ConfigError as error:
                exit_with(str(error))
    for number, problem in enumerate(sentences, 1):
        print(f"problem {number}: {problem}", file=sys.stderr)
    return 2 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains a grid of models alike, and draws loss against bytes of KV cache.

    lckv-megatron study examples/study/study.yaml --output runs/study
    lckv-megatron study examples/study/study.yaml --output runs/study --dry-run
    lckv-megatron study study.yaml --output runs/study --at-once 8 --devices 0 1 2 3 4 5 6 7

The file says which settings all runs share, with which seeds each model is trained, how much of what (FLOPs
by the cost model, or tokens), and what is measured; examples/study/README.md explains it. A model may have
stages: each begins with the weights of the one before, and stages that several models begin with are trained
once. Each model is converted to Hugging Face's format and measured there: loss through the engine's cache,
bytes of cache as allocated, and, models in turns, time of a prompt, largest batch and decoding speed of that
batch.

The command can be given again: it goes on where it was. In the output folder are
    rows.csv    a row for each model with each seed; what has a row is not done again
    table.md    means over seeds, the largest cache first
    front.png   the picture
    runs/       a folder for each run: settings, log, metrics, checkpoints
    models/     a folder for each model: Hugging Face folder, log
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lckv_megatron.study.carrying_out import PICTURE, ROWS, TABLE, CarryingOut, check_rows_are_here
from lckv_megatron.study.checks import check
from lckv_megatron.study.description import Study, read_study
from lckv_megatron.study.jobs import Slots
from lckv_megatron.study.trainings import Subject, subjects_of, trainings_of
from lckv_megatron.tables import table
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.checkpointing.errors import FolderInUseError, UnwritableFolderError
from megatron_ext.checkpointing.lock import FolderLock, Purpose
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from megatron_ext.signals import deferred

logger = logging.getLogger(__name__)


class _FailedError(ArithmeticError):
    """Some run has failed; the others are done."""


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("study", __doc__)
    parser.add_argument("study", type=Path, metavar="FILE", help="the study, in YAML")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="where all of it lies"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="only these seeds (default: the file's)"
    )
    parser.add_argument(
        "--at-once", type=positive, default=1, metavar="N", help="programs at once (default: %(default)s)"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        default=[],
        metavar="ID",
        help="CUDA devices, shared out among the programs (default: each uses what there is)",
    )
    parser.add_argument(
        "--processes-per-run",
        type=positive,
        default=1,
        metavar="N",
        help="of training (default: %(default)s)",
    )
    parser.add_argument(
        "--hours", type=float, default=24.0, help="after which a program is ended (default: %(default)g)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="say what would be run and what cannot work; run nothing"
    )
    what.add_argument(
        "--rows-only", action="store_true", help="write table and picture of the rows that are there"
    )
    return parser


def chosen(study: Study, options: argparse.Namespace) -> tuple[list[Subject], list[Subject]]:
    """The models with the seeds that were asked for, and the others. Raises ConfigError."""
    names = [entry.name for entry in study.models]
    for what, wanted, known in (("--models", options.models, names), ("--seeds", options.seeds, study.seeds)):
        if unknown := [value for value in wanted or () if value not in known]:
            raise ConfigError(
                f"{what} has {', '.join(map(str, unknown))}; {options.study} has "
                f"{', '.join(map(str, known))}."
            )
    asked, others = list[Subject](), list[Subject]()
    for subject in subjects_of(study):
        of_models = not options.models or subject.entry.name in options.models
        of_seeds = not options.seeds or subject.seed in options.seeds
        (asked if of_models and of_seeds else others).append(subject)
    return asked, others


def slots_of(options: argparse.Namespace) -> Slots:
    """How many programs run at once, and on what. Raises ConfigError."""
    at_once, processes, devices = options.at_once, options.processes_per_run, options.devices
    if devices and len(devices) < at_once * processes:
        raise ConfigError(
            f"--devices names {len(devices)}, but --at-once {at_once} runs of --processes-per-run "
            f"{processes} need {at_once * processes}; name as many, or run fewer at once."
        )
    if not options.hours > 0:
        raise ConfigError(f"--hours is {options.hours:g}; it must be above 0.")
    return Slots(at_once, tuple(devices), options.hours)


def plan_lines(subjects: Sequence[Subject]) -> Iterator[str]:
    """What a study trains, a line for each model with each seed."""
    rows = [("model", "seed", "steps of its stages", "tokens", "FLOPs")]
    for subject in subjects:
        run = subject.training
        if run is None:
            rows.append((subject.entry.name, str(subject.seed), f"trained in {subject.checkpoint}", "", ""))
            continue
        steps = " + ".join(f"{stage.run.train.train_iters:,}" for stage in run.chain)
        rows.append(
            (subject.entry.name, str(subject.seed), steps, f"{run.all_tokens:,}", f"{run.all_flops:.3g}")
        )
    yield from table(rows)
    runs = trainings_of([*subjects])
    yield f"{len(runs)} runs for {len(subjects)} rows, {sum(run.flops for run in runs):.3g} FLOPs in all"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the only program that writes into `folder`. Raises ConfigError."""
    advice = "Two studies would write over each other's rows: wait for that one or end it, or give another"
    lock = FolderLock(folder, purpose=Purpose(f"--output: {folder}", f"{advice} --output"))
    try:
        lock.take()
    except FolderInUseError as error:
        raise ConfigError(f"{error}.") from None
    except UnwritableFolderError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.__cause__}.") from error
    try:
        yield
    finally:
        with deferred():
            lock.release()


def carry_out(options: argparse.Namespace) -> None:
    """The program. Raises ConfigError before anything runs, and ArithmeticError where a run has failed."""
    slots = slots_of(options)
    study = read_study(options.study)
    subjects, others = chosen(study, options)
    if options.dry_run:
        print("\n".join(plan_lines(subjects)))
        check(subjects, study.measure, options.processes_per_run)
        return
    if options.rows_only:
        check_rows_are_here(options.output)
    else:
        check(subjects, study.measure, options.processes_per_run)
    with held(options.output):
        work = CarryingOut(
            study, subjects, options.output, processes=options.processes_per_run, others=others
        )
        if options.rows_only:
            work.write()
        else:
            runs, rows = len(work.untrained), len(work.unmeasured)
            there = len(subjects) - rows
            logger.info("%d rows are there, %d runs and %d rows are to come", there, runs, rows)
            if failures := work.run(slots, logger.info):
                raise _FailedError("\n".join(map(str, failures)))
    print(*(options.output / name for name in (ROWS, TABLE, PICTURE)), sep="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    set_up_logging()
    return exit_status(lambda: carry_out(options), on_stop="; give the same command to go on")


if __name__ == "__main__":
    sys.exit(main())

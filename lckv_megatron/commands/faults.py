"""Tries faults: killed saves, damaged and malicious files, clients that misbehave.

    lckv-megatron faults --short
    lckv-megatron faults --kinds damage,malice --seed 7 --work-folder work

Everything is made anew in the work folder, tiny and on the CPU. kills: trainings are killed while they save,
and must go on bit for bit. damage: bytes of checkpoints, models, tokenizers and datasets are changed, and
that must be noticed or harmless. malice: files, indices and settings that a stranger could hand out must be
refused by name, in bounded time and memory, and nothing of them be run. requests: clients ask the server,
some of them badly; every answer must be right or a proper error. Prints how many of each kind ended how; the
exit status is 1 where anything is wrong.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from lckv_megatron.faults.materials import Materials
    from lckv_megatron.faults.tally import Tally

KINDS = ("kills", "damage", "malice", "requests")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extent:
    """How much of each kind is tried."""

    moments: int
    """Random moments at which trainings of one process are killed, and of two."""
    points: int | None
    """File operations in front of which they are killed; None: every one."""
    damages_per_file: int
    share_of_attacks: float
    requests: int


FULL = Extent(moments=10, points=None, damages_per_file=16, share_of_attacks=1.0, requests=3000)
SHORT = Extent(moments=1, points=2, damages_per_file=1, share_of_attacks=0.03, requests=90)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ProgramParser("faults", __doc__)
    parser.add_argument(
        "--kinds",
        type=_kinds,
        default=KINDS,
        metavar="KIND,...",
        help=f"of {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument("--short", action="store_true", help="a few of each kind: about a minute")
    parser.add_argument(
        "--requests", type=positive, metavar="N", help=f"to the server (default: {FULL.requests})"
    )
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (default: 1)")
    parser.add_argument(
        "--work-folder", type=Path, metavar="DIR", help="new or empty; kept (default: a temporary one)"
    )
    options = parser.parse_args(argv)
    set_up_logging()
    wrong: list[str] = []
    status = exit_status(lambda: wrong.extend(campaign(options)))
    return status or (1 if wrong else 0)


def _kinds(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return chosen


def campaign(options: argparse.Namespace) -> list[str]:
    """Try what the options say and print the table; returns what went wrong. Raises ConfigError."""
    extent = SHORT if options.short else FULL
    with ExitStack() as stack:
        # Before torch is loaded: the campaign forks, which threads do not survive.
        os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
        work = _work_folder(options.work_folder, stack)
        from lckv_megatron.faults import materials, tally

        logger.info("making small models, checkpoints and datasets in %s", work)
        made = materials.make(work / "materials")
        tallies = []
        for counted in _tallies(options, extent, made, work):
            tallies.append(counted)
            for line in counted.wrongs:
                logger.error("wrong: %s", line)
        print("\n".join(tally.lines(tallies)))
    return [line for counted in tallies for line in counted.wrongs]


def _work_folder(given: Path | None, stack: ExitStack) -> Path:
    if given is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
    try:
        given.mkdir(parents=True, exist_ok=True)
        if any(given.iterdir()):
            raise ConfigError(f"--work-folder {given} is not empty; give a new folder.")
    except OSError as error:
        raise ConfigError(f"--work-folder {given} cannot be made: {error.strerror}.") from error
    return given.absolute()


def _tallies(options: argparse.Namespace, extent: Extent, made: "Materials", work: Path) -> "Iterator[Tally]":
    from lckv_megatron.faults import damage, kills, malice
    from lckv_megatron.faults.requests import requests

    seed, copies, number = options.seed, work / "materials", options.requests or extent.requests
    totals: dict[str, Callable[[], int]] = {
        "kills": lambda: kills.count(work, extent.moments, extent.points),
        "damage": lambda: extent.damages_per_file * sum(len(one.files) for one in damage.targets(made)),
        "malice": lambda: malice.count(made, extent.share_of_attacks),
        "requests": lambda: number,
    }
    kinds: dict[str, Callable[[Callable[[int], object]], Iterator[Tally]]] = {
        "kills": lambda step: kills.kills(work, extent.moments, extent.points, seed, step),
        "damage": lambda step: damage.damage(made, copies, extent.damages_per_file, seed, step),
        "malice": lambda step: malice.malice(made, copies, extent.share_of_attacks, seed, step),
        "requests": lambda step: requests(made.huggingface, number, seed, step),
    }
    for kind in options.kinds:
        with tqdm(total=totals[kind](), desc=kind, unit="", disable=None) as bar:
            yield from kinds[kind](bar.update)


if __name__ == "__main__":
    sys.exit(main())

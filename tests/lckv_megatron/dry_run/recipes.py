"""The recipes of examples/ for clusters, dry run: the tables of docs/dry_run.md.

    python -m tests.lckv_megatron.dry_run.recipes

prints them, to be put into the page. test_recipes.py compares the page with what the dry run says.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.options import model_flops
from lckv_megatron.dry_run.rank import RankRun, simulate
from lckv_megatron.dry_run.report import collective_rows, host_rows, memory_rows, mfu, time_rows
from lckv_megatron.planning.inputs import launched_processes
from lckv_megatron.planning.plan import Plan
from lckv_megatron.tables import markdown_table
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from tests.examples import shared_map

_EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
Row = tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A recipe, and which of its ranks are shown."""

    name: str
    file: str = "pretrain.yaml"
    over: str | None = None
    """Settings on top of it."""
    ranks: tuple[int, ...] = (0,)
    world_size: int | None = None
    """None: what its launch.sh starts."""

    def of_ranks(self, *ranks: int) -> "Recipe":
        """The recipe with other ranks shown."""
        return replace(self, ranks=ranks)

    @property
    def title(self) -> str:
        """In the tables."""
        return self.name if self.over is None else f"{self.name}, {self.over.removesuffix('.yaml')}"

    @property
    def run(self) -> RunConfig:
        """Its settings."""
        if self.name == "shared_map":
            return shared_map.run_config()
        files = [self.file] if self.over is None else [self.file, self.over]
        return parse_run_config([f"--config={_EXAMPLES / self.name / file}" for file in files])

    @property
    def processes(self) -> int:
        """On which it runs."""
        number = self.world_size or launched_processes([str(_EXAMPLES / self.name / self.file)])
        assert number is not None
        return number


RECIPES = (
    Recipe("llama_1b_lckv"),
    Recipe("yoco_3b", ranks=(0, 48)),
    Recipe("llama2_13b_lckv"),
    Recipe("llama2_13b_dmc", "retrofit.yaml"),
    Recipe("shared_map", "uptrain.yaml", world_size=8),
    Recipe("long_context_7b"),
    Recipe("long_context_7b", over="yoco.yaml"),
)


def ranks_of(recipe: Recipe, *, traced: bool = False) -> list[RankRun]:
    """What the dry run says of the ranks that are shown; with their traces where `traced`."""
    run = recipe.run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron tells what is not installed
        return [
            simulate(
                run,
                rank=rank,
                world_size=recipe.processes,
                vocab_size=run.model.vocab_size or 0,
                machine=Machine(),
                traced=traced,
            )
            for rank in recipe.ranks
        ]


def tables_of(recipe: Recipe, ranks: list[RankRun]) -> list[list[Row]]:
    """Memory, collectives, times, and what is on the host, each with its head; the recipe's name is the first
    column."""
    run = recipe.run
    stages = run.parallel.pipeline_model_parallel_size
    plan = Plan(run, recipe.processes, run.model.vocab_size or 0, utilisation=1.0)
    share = f"{100 * mfu(ranks, Machine(), stages, model_flops(plan)):.1f} %"
    head, *on_host = host_rows(ranks, Machine())
    return [
        narrow(recipe, memory_rows(ranks, Machine()), ("stage", "weights held", "verdict")),
        narrow(recipe, collective_rows(ranks), ()),
        narrow(recipe, time_rows(ranks, Machine(), stages), ("optimizer", "other", "copies")),
        narrow(recipe, [(*head, "MFU"), *((*row, share) for row in on_host)], ("back", "copies")),
    ]


def narrow(recipe: Recipe, rows: Iterable[Row], without: tuple[str, ...]) -> list[Row]:
    """Rows with the recipe's name, without some columns: lines of the page are short."""
    head, *others = rows
    kept = [column for column, name in enumerate(head) if name not in without]
    named = (("recipe", head), *((recipe.title, row) for row in others))
    return [(name, *(row[column] for column in kept)) for name, row in named]


def _page() -> Iterator[str]:
    of_recipes = [tables_of(recipe, ranks_of(recipe)) for recipe in RECIPES]
    for tables in zip(*of_recipes, strict=True):
        head = tables[0][0]
        yield from markdown_table([head, *(row for table in tables for row in table[1:])])
        yield ""


if __name__ == "__main__":
    print("\n".join(_page()))

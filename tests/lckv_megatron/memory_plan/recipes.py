"""The memory plans of the recipes for clusters: the table and the picture of docs/memory_plan.md.

    python -m tests.lckv_megatron.memory_plan.recipes [PICTURE]

prints the table, to be put into the page, and draws one recipe. It takes minutes; test_recipes.py compares
one rank.
"""

import sys
from pathlib import Path

from lckv_megatron.memory_plan.picture import draw
from lckv_megatron.memory_plan.rank import RankPlan, plan_rank
from lckv_megatron.memory_plan.report import kind_rows, plan_rows
from lckv_megatron.tables import markdown_table
from tests.lckv_megatron.dry_run.recipes import RECIPES, Recipe, Row, narrow, ranks_of

DRAWN = "llama_1b_lckv"


def plans_of(recipe: Recipe) -> list[RankPlan]:
    """Of the ranks that are shown."""
    return [plan_rank(run.rank, run.trace) for run in ranks_of(recipe, traced=True)]


def rows_of(recipe: Recipe, plans: list[RankPlan]) -> list[Row]:
    """The recipe's rows of the table, below the head."""
    return narrow(recipe, plan_rows(plans), ("above live",))


def _main(picture: str | None) -> None:
    plans = {recipe: plans_of(recipe) for recipe in RECIPES}
    tables = [rows_of(recipe, of_recipe) for recipe, of_recipe in plans.items()]
    print("\n".join(markdown_table([tables[0][0], *(row for table in tables for row in table[1:])])))
    for recipe, of_recipe in plans.items():
        for plan in of_recipe:
            print(f"\n{recipe.title} {plan.rank}", plan.placement.placement.how, plan.placement.loose)
            print("\n".join(markdown_table(kind_rows(plan))))
        if picture is not None and recipe.name == DRAWN:
            draw(of_recipe, Path(picture))


if __name__ == "__main__":
    _main(*(sys.argv[1:] or [None]))

"""The table of docs/memory_plan.md says what the plan says, for one rank; all recipes are in it."""

import re
from pathlib import Path

import pytest

from tests.lckv_megatron.dry_run.recipes import RECIPES, Row
from tests.lckv_megatron.memory_plan.recipes import plans_of, rows_of

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "memory_plan.md").read_text(encoding="utf-8")
TOLERANCE = {"GiB": 0.02, "%": 0.3}
"""Of bytes relative, of shares absolute: versions of Megatron and PyTorch differ a little."""


def shown(recipe: str) -> list[Row]:
    """Rows of the page's table for one recipe, and its head."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return [cells[0], *(row for row in cells if row[0] == recipe)]


def require_same(said: str, expected: str) -> None:
    number, unit = re.fullmatch(r"([-\d.,]+) (GiB|%)", expected).groups()
    limits = {"rel": TOLERANCE[unit], "abs": 0.01} if unit == "GiB" else {"abs": TOLERANCE[unit]}
    assert said.endswith(unit)
    assert float(said.split()[0]) == pytest.approx(float(number), **limits)


def test_the_page_says_what_the_plan_says() -> None:
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == "yoco_3b")
    one = recipe.of_ranks(48)
    (plan,) = plans_of(one)
    assert plan.live_peak <= plan.peak <= plan.expandable.reserved <= plan.segments.reserved
    head, said = rows_of(one, [plan])
    shown_head, *rows = shown("yoco_3b")
    assert head == shown_head
    (expected,) = [row for row in rows if row[1] == "48"]
    assert said[:2] == expected[:2]
    for cell, other in zip(said[2:], expected[2:], strict=True):
        require_same(cell, other)


def test_every_recipe_is_on_the_page() -> None:
    for recipe in RECIPES:
        assert [row[1] for row in shown(recipe.title)[1:]] == [*map(str, recipe.ranks)]

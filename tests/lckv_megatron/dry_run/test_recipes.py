"""Every recipe for a cluster fits into its GPUs, and does what docs/dry_run.md says: bytes by kind,
collectives by kind and group, times."""

import re
from pathlib import Path

import pytest

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.report import verdict
from tests.lckv_megatron.dry_run.recipes import RECIPES, Recipe, Row, ranks_of, tables_of
from tests.thinning import thinned

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "dry_run.md"
TOLERANCE = 0.02
"""Relative, for bytes and times: versions of Megatron and PyTorch differ a little. Counts are equal."""
NUMBER = re.compile(r"([0-9][0-9,.e+-]*)( .*)?")


def shown(recipe: str) -> list[Row]:
    """Rows of the page's tables for one recipe."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## The recipes\n")
    lines = section.splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line[:1] == "|"]
    return [row for row in cells if row[0] == recipe]


def same(said: str, expected: str) -> bool:
    numbers = [NUMBER.fullmatch(cell) for cell in (said, expected)]
    if said == expected or not all(numbers):
        return said == expected
    (value, unit), (other, other_unit) = ((match[1].replace(",", ""), match[2]) for match in numbers)
    if unit == other_unit is None and value.isdigit() and len(value) < 8:
        return value == other  # a count
    return unit == other_unit and float(value) == pytest.approx(float(other), rel=TOLERANCE, abs=0.01)


@pytest.mark.parametrize("recipe", thinned(RECIPES, 4), ids=lambda recipe: recipe.title)
def test_the_page_says_what_the_dry_run_says(recipe: Recipe) -> None:
    ranks = ranks_of(recipe)
    said = [row for table in tables_of(recipe, ranks) for row in table[1:]]
    expected = shown(recipe.title)
    assert len(said) == len(expected) > 3
    different = [
        (row, other)
        for row, other in zip(sorted(said), sorted(expected), strict=True)
        if not all(map(same, row, other))
    ]
    assert different == []
    assert {verdict(rank, Machine()) for rank in ranks} == {"fits"}


@pytest.mark.parametrize("place", [0, 1], ids=["plain", "yoco"])
def test_the_page_of_a_million_tokens_says_the_same(place: int) -> None:
    recipe = [recipe for recipe in RECIPES if recipe.name == "long_context_7b"][place]
    rows = shown(recipe.title)
    memory, times, *_, host = rows
    page = (EXAMPLES / recipe.name / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in page.splitlines()]
    said = {row[0]: row[1 + place] for row in cells if len(row) == 3}
    assert said["peak of the device, per rank"] == memory[-1]
    assert said["memory of the host, per rank; of the node"] == "; ".join(host[4:6])
    assert said["to the host and back, per rank and step"] == f"{host[3]} each way"
    assert (said["a step"], said["MFU"]) == (f"{times[-3]} s", host[-1])
    assert float(host[-1].split()[0]) >= 48, "what the recipe is for"


def test_every_recipe_for_a_cluster_is_among_them() -> None:
    launched = {path.parent.name for path in EXAMPLES.glob("*/launch.sh")}
    assert {recipe.name for recipe in RECIPES} == launched | {"shared_map"}


@pytest.mark.parametrize(
    ("said", "expected", "equal"),
    [
        ("594", "594", True),
        ("594", "593", False),
        ("20.93 GiB", "21.00 GiB", True),
        ("20.93 GiB", "25.00 GiB", False),
        ("38,016", "38,015", False),
        ("fits", "does not fit", False),
        ("3.183e+15", "3.2e+15", True),
    ],
)
def test_cells_are_compared(said: str, expected: str, equal: bool) -> None:
    assert same(said, expected) == equal

"""The benchmark of cheaper training, at a tiny size."""

import csv
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lckv.cost import training_cost
from tools.benchmarks.cyclic.grid import MAPS, Cell, Sizes, grid
from tools.benchmarks.cyclic.models import new_model, round_passes_without_gradient, trained
from tools.benchmarks.cyclic.table import table
from tools.benchmarks.cyclic_training import main

ROOT = Path(__file__).resolve().parents[3]
SIZES = Sizes(steps=800, hidden_size=256, rows=1, length=192, learning_rate=0.001)


def test_cells_are_trained_measured_and_not_trained_again(tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "rows.csv"
    text.write_bytes(bytes(range(64)) * 16)
    sizes = ["--steps", "2", "--hidden-size", "16", "--rows", "1", "--length", "8", "--held-out", "2"]
    words = ["--text", str(text), "--output", str(output), *sizes]
    main([*words, "--cells", "2"])
    main([*words, "--cells", "2"])
    rows = list(csv.DictReader(output.read_text().splitlines()))
    cells = list(grid(Sizes(2, 16, 1, 8)))
    assert [(row["map"], row["m"], row["b"], row["first_guess"]) for row in rows] == [
        (cell.map, str(cell.m), str(cell.b), str(cell.first_guess)) for cell in cells[:4]
    ]
    plain = rows[0]
    assert plain["flops_of_plain_step"] == "1.0000"
    assert plain["loss_exact"] == plain["loss_zeros_1"]
    assert plain["loss_guess_1"] == "nan"
    assert {row["tokens"] for row in rows} == {"16"}
    main([*words, "--cells", "1", "--seed", "2"])
    *_, last = csv.DictReader(output.read_text().splitlines())
    assert (last["map"], last["seed"]) == ("plain", "2")


def test_every_cell_can_be_trained_and_is_there_once() -> None:
    cells = list(grid(SIZES))
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert cell.compression.problems(8) == []
        assert {cell.plan(step, 100).forward_passes for step in range(100)} <= set(range(8))
    assert {cell.map for cell in cells} == set(MAPS)
    assert Cell("plain", 0, 1) == cells[0]
    assert {replace(cell, seed=2) for cell in cells if cell.seed == 1} == {
        cell for cell in cells if cell.seed == 2
    }


def test_cells_of_equal_operations_cost_the_same() -> None:
    costs = [
        cell.share * training_cost(SIZES.shape(), cell.compression).ratio
        for cell in grid(SIZES)
        if cell.share != 1
    ]
    assert len(costs) == 10
    assert costs == pytest.approx(
        [training_cost(SIZES.shape(), Cell("lckv w=2", 1, 1).compression).ratio] * 10, 2e-3
    )


def test_a_first_guess_is_measured(tmp_path: Path) -> None:
    tokens = torch.arange(256).repeat(4)
    row = trained(Cell("lckv w=2", 0, 1, first_guess=True), Sizes(2, 16, 1, 8), tokens, tokens[:32])
    assert row["loss_guess_1"] != "nan"


def test_only_passes_without_gradient_are_rounded() -> None:
    sizes, tokens = Sizes(2, 16, 1, 8), torch.arange(8)[None]

    def loss(cell: Cell, *, training: bool = True) -> float:
        model = new_model(cell, sizes).train(training)
        if cell.fp8:
            round_passes_without_gradient(model)
        return float(model(tokens, labels=tokens).loss)

    def difference(m: int, b: int, **how: bool) -> float:
        cell = Cell("lckv w=2", m, b)
        return abs(loss(replace(cell, fp8=True), **how) - loss(cell, **how))

    assert 0 < difference(1, 1) < 1e-2
    assert difference(0, 2) == difference(1, 1, training=False) == 0


def test_the_page_has_the_table_of_the_rows() -> None:
    lines = (ROOT / "docs" / "cyclic_training.md").read_text(encoding="utf-8").splitlines()
    rows = table(ROOT / "tools" / "benchmarks" / "results" / "cyclic_training.csv")
    start = lines.index(rows[0])
    assert lines[start : start + len(rows)] == rows
    assert not lines[start + len(rows)].startswith("|")


def test_a_line_has_means_and_what_separates_each_seed_from_the_published_passes(tmp_path: Path) -> None:
    cells = [Cell("lckv w=2", m, b, seed=seed) for m, b in ((7, 2), (1, 1)) for seed in (1, 2)]
    cells.append(Cell("lckv w=2", 7, 2, fp8=True, seed=3))
    path, sizes = tmp_path / "rows.csv", asdict(SIZES)
    with path.open("w", newline="") as file:
        numbers = "loss_exact", "loss_zeros_1", "loss_zeros_2", "loss_exact_twice_the_length"
        measured = dict.fromkeys((*numbers, "flops_of_plain_step", "cpu_seconds_of_plain_step"), 1.5)
        rows = [asdict(cell) | sizes | measured | {"passes_until_exact": 2} for cell in cells]
        for row, loss in zip(rows, (2.0, 2.2, 2.1, 2.1, 2.0), strict=True):
            row["loss_exact"] = loss
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    published, cheap, rounded = table(path)[2:]
    another = path.read_text().replace(",192,0.001,", ",256,0.001,", 1)
    path.write_text(another)
    with pytest.raises(ValueError, match="rows of 2 sizes or learning rates; give each its own file"):
        table(path)
    assert published.startswith("| lckv w=2 | 7, 2 | - | 1.50 | 1.50 | 2.100 | +0.000, +0.000 |")
    assert cheap.startswith("| lckv w=2 | 1, 1 | - | 1.50 | 1.50 | 2.100 | +0.100, -0.100 |")
    assert rounded.startswith("| lckv w=2 | 7, 2 | FP8 | 1.50 | 1.50 | 2.000 | ? |")

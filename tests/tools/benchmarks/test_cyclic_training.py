"""The benchmark of cheaper training, at a tiny size."""

import csv
from pathlib import Path

from tools.benchmarks.cyclic_training import MAPS, Cell, grid, main, table

ROOT = Path(__file__).resolve().parents[3]


def test_cells_are_trained_measured_and_not_trained_again(tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "rows.csv"
    text.write_bytes(bytes(range(64)) * 16)
    sizes = ["--steps", "2", "--hidden-size", "16", "--rows", "1", "--length", "8", "--held-out", "2"]
    words = ["--text", str(text), "--output", str(output), *sizes]
    main([*words, "--cells", "2"])
    main([*words, "--cells", "2"])
    rows = list(csv.DictReader(output.read_text().splitlines()))
    cells = list(grid())
    assert [(row["map"], row["m"], row["b"], row["first_guess"]) for row in rows] == [
        (cell.map, str(cell.m), str(cell.b), str(cell.first_guess)) for cell in cells[:4]
    ]
    plain, *_, guess = rows
    assert plain["flops_of_plain_step"] == "1.0000"
    assert plain["loss_exact"] == plain["loss_zeros_1"]
    assert plain["loss_guess_1"] == "nan"
    assert guess["loss_guess_1"] != "nan"
    assert {row["tokens"] for row in rows} == {"16"}


def test_every_cell_can_be_trained_and_is_there_once() -> None:
    cells = list(grid())
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert cell.compression.problems(8) == []
        assert {cell.plan(step, 100).forward_passes for step in range(100)} <= set(range(8))
    assert {cell.map for cell in cells} == set(MAPS)
    assert Cell("plain", 0, 1) == cells[0]


def test_the_page_has_the_table_of_the_rows() -> None:
    lines = (ROOT / "docs" / "cyclic_training.md").read_text(encoding="utf-8").splitlines()
    rows = table(ROOT / "tools" / "benchmarks" / "results" / "cyclic_training.csv")
    start = lines.index(rows[0])
    assert lines[start : start + len(rows)] == rows
    assert not lines[start + len(rows)].startswith("|")


def test_seeds_of_a_cell_are_averaged(tmp_path: Path) -> None:
    rows = (ROOT / "tools" / "benchmarks" / "results" / "cyclic_training.csv").read_text().splitlines()
    again = rows[1].replace(",1.0,1,", ",1.0,2,", 1).replace("2.1085", "2.2085")
    copy = tmp_path / "rows.csv"
    copy.write_text("\n".join([rows[0], rows[1], again]) + "\n")
    (line,) = table(copy)[2:]
    assert line.startswith("| plain | - | - | 1, 2 | 1.00 |")
    assert "| 2.1585 |" in line

"""The README's speed table is what the benchmarks' rows say."""

from pathlib import Path

import pytest

from tools.benchmarks import speed

ROOT = Path(__file__).resolve().parents[3]


def test_the_readme_has_the_table_of_the_rows() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = speed.table(speed.RESULTS)
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    assert not lines[start + len(table)].startswith("|")


def test_each_line_names_its_peer_and_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--table"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| what | this project | to | limit | rows |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert {len(row) for row in cells} == {5}
    assert all(all(row) for row in cells)
    assert {row[4].split("]")[0][1:] for row in cells} <= set(speed.ARGUMENTS)


def test_every_benchmark_of_the_table_is_there_and_takes_what_it_is_given(monkeypatch) -> None:
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr(speed.subprocess, "run", lambda command, **_: commands.append(command) or Done())
    assert speed.main(["checkpoints", "early_exit", "--results", str(ROOT / "build")]) == 0
    assert [command[2] for command in commands] == [
        "tools.benchmarks.checkpoints",
        "tools.benchmarks.early_exit",
    ]
    assert commands[1][3:] == ["--clock", "cpu", "--output", str(ROOT / "build" / "early_exit.csv")]
    assert all((ROOT / "tools" / "benchmarks" / f"{name}.py").exists() for name in speed.ARGUMENTS)


def test_a_benchmark_that_fails_is_named(
    monkeypatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "run", lambda name, results: name == "blends")
    assert speed.main(["blends", "checkpoints", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "failed: blends\n"


def test_a_row_that_is_not_the_only_one_is_no_number(tmp_path: Path) -> None:
    rows = speed.Rows("x", [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}])
    assert rows.value("b", b="3") == 3
    with pytest.raises(ValueError, match="unpack"):
        rows.value("b", a="1")
    with pytest.raises(ValueError, match="unpack"):
        rows.value("b", a="2")

"""The studies of examples/study: their runs fit together, and the page says what their rows say."""

from pathlib import Path

import pytest

from lckv_megatron.study.description import Study, read_study
from lckv_megatron.study.rows import points_of, read_rows, table_of
from lckv_megatron.study.trainings import subjects_of, trainings_of
from megatron_ext.validation.run import problems

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "tools" / "benchmarks" / "results" / "study" / "rows.csv"


@pytest.fixture(params=["study", "study_h200"])
def study(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """With the vocabulary of the data, which are not there."""
    read = read_study(ROOT / "examples" / "study" / f"{request.param}.yaml")
    monkeypatch.setattr("lckv_megatron.study.trainings.find_vocab_size", lambda run: 1024)
    monkeypatch.setattr("lckv_megatron.study.trainings.find_sources", lambda texts: [])
    return read


def test_every_run_can_work_and_all_cost_the_same(study: Study) -> None:
    subjects = subjects_of(study)
    assert len(study.models) >= 14
    for run in trainings_of(subjects):
        assert problems(run.run, 1) == [], run.run
    costs = [subject.training.all_flops for subject in subjects if subject.training is not None]
    assert max(costs) < 1.03 * min(costs)
    shared = sum(len(subject.training.chain) for subject in subjects if subject.training is not None)
    assert len(trainings_of(subjects)) < shared


def test_the_page_says_what_the_rows_say() -> None:
    lines = (ROOT / "docs" / "quality_per_byte.md").read_text(encoding="utf-8").splitlines()
    study = read_study(ROOT / "examples" / "study" / "study.yaml")
    names = [entry.name for entry in study.models]
    rows = sorted(read_rows(ROWS).values(), key=lambda row: (row["seed"], names.index(row["model"])))
    table = [*table_of(points_of(rows), study.budget.model)]
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    assert lines[start + len(table)] == ""

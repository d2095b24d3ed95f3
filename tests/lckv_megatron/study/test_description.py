"""A study's file is read strictly."""

from pathlib import Path
from typing import Any

import pytest

from lckv_megatron.study.description import read_study
from megatron_ext.errors import ConfigError
from tests.lckv_megatron.study.studies import content, study, write


def test_defaults(tmp_path: Path) -> None:
    read = study(tmp_path, {"plain": {}})
    (entry,) = read.models
    assert (entry.name, entry.stages[0].share, entry.checkpoints, entry.export) == ("plain", 1.0, (), None)
    assert (read.seeds, read.budget.equal, read.measure.clock) == ((1,), "flops", "wall")


def test_a_file_wins_over_what_it_extends(tmp_path: Path) -> None:
    write(tmp_path, {"train": {"seq_length": "64"}}, "base.yaml")
    write(tmp_path, content({"a": {}, "b": {}}, base=["base.yaml"]), "first.yaml")
    second = {
        "extends": "first.yaml",
        "seeds": [3, 4],
        "budget": {"iterations": 7},
        "settings": {"optimizer": {"lr": 1}},
    }
    second["models"] = {"b": {"settings": {"train": {"seq_length": 128}}}, "c": {}}
    read = read_study(write(tmp_path, second))
    assert [entry.name for entry in read.models] == ["a", "b", "c"]
    assert read.entry("b").settings == {"train": {"seq_length": "128"}}
    assert (read.seeds, read.budget.iterations, read.budget.model) == ((3, 4), 7, "a")
    places = [origin.rpartition("/")[2] for origin, _ in read.base]
    assert places == ["base.yaml: ", "first.yaml: settings: ", "study.yaml: settings: "]


def test_a_circle_of_files(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        read_study(write(tmp_path, {"extends": "a.yaml"}, "b.yaml"))


@pytest.mark.parametrize(
    ("models", "changes", "message"),
    [
        ({}, {}, "budget.model is ''; it must be one of the models that are trained here: there are none"),
        ({"a": {}}, {"budget": {"iterations": 9, "model": "b"}}, "budget.model is 'b'; it must be .*: a"),
        ({"a": {}}, {"budget": {"model": "a"}}, "budget.iterations is 0; it must be at least 1"),
        ({"a": {}}, {"budget": {"equal": "time"}}, "budget.equal is 'time'"),
        ({"a": {}}, {"measure": {}}, "measure.text is not given; name held-out files"),
        ({"a": {}}, {"measure": {"text": ["x"], "stride": 0}}, "measure.stride is 0; it must be at least 1"),
        ({"a": {}}, {"measure": {"text": ["x"], "strid": 1}}, "measure.strid is unknown; did you mean"),
        ({"a": {}}, {"seeds": [1, 1]}, r"seeds is \['1', '1'\]; it must be a list of different"),
        ({"a": {}}, {"seeds": ["x"]}, "whole numbers"),
        ({"a": {}}, {"sedes": [1]}, "sedes is unknown; did you mean seeds"),
        ({"a": 3}, {}, "models: a is '3'; it must be a mapping of names to values"),
        ({"a": {"train": {}}}, {}, "models: a has train; it takes settings, stages, checkpoints, export"),
        ({"a": {"stages": []}}, {}, r"models: a: stages is \[\]; it must be a list of mappings"),
        ({"a": {"stages": [{"share": 2}]}}, {}, "a: stage 1: share is '2'; it must be a number above 0"),
        ({"a": {"stages": [{}, {}]}}, {}, "models: a: stage 1: share is None"),
        (
            {"a": {"stages": [{"share": 0.5}, {"share": 0.4}]}},
            {},
            "models: a: the shares of its stages add up to 0.9; they must be 1 together",
        ),
        ({"a": {"stages": [{"shares": 1}]}}, {}, "models: a: stage 1 has shares; it takes share, settings"),
        ({"a": {"export": ["0_0"]}}, {}, r"models: a: export is \['0_0'\]; it must be a sharing map"),
        (
            {"a": {}, "b": {"checkpoints": ["x"], "settings": {"train": {}}}},
            {},
            "models: b has checkpoints beside settings or stages",
        ),
        ({"a": {}, "b": {"checkpoints": []}}, {}, r"b: checkpoints is \[\]; it must be a list of folders"),
        ({"a": {}, "b": {"checkpoints": None}}, {}, "b: checkpoints is None; it must be a list of folders"),
        ({"a": {}, "b": {"checkpoints": [None]}}, {}, r"checkpoints is \[None\]; it must be a list of"),
        ({"a": {}, "b": {"checkpoints": {"x": 1}}}, {}, r"checkpoints is \{'x': '1'\}; it must be a list"),
        ({"a": {}, "b": {"checkpoints": ["x", "y"]}}, {}, "checkpoints has 2 folders, one for each seed"),
        ({"a": {}, "": {}}, {}, "models has the name ''; give a model a name in one line"),
        ({"a": {}, "b\nc": {}}, {}, r"models has the name 'b\\nc'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    models: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, models, **changes)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml cannot be read: No such file"):
        read_study(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("models: {a: 1\nb")
    with pytest.raises(ConfigError, match=r"bad.yaml, line 2, column 2 is not valid YAML"):
        read_study(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad.yaml is not a text in UTF-8"):
        read_study(tmp_path / "bad.yaml")

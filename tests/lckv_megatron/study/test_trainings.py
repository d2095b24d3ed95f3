"""Budgets are the cost model's, and what models have in common is trained once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lckv.config import CompressionConfig
from lckv.cost import training_cost
from lckv.policies.dms.config import DMSConfig
from lckv_megatron.study import trainings
from lckv_megatron.study.description import Study
from lckv_megatron.study.trainings import Subject, subjects_of, trainings_of
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape
from tests.lckv.models.tiny import model
from tests.lckv_megatron.study.studies import PLAIN, study
from tests.megatron_ext.data.builders import write_dataset

LCKV = {"settings": {"compression": {"layer_types": "0_2_2_3", "forward_passes": 7, "backward_passes": 2}}}
HALVES = [{"share": 0.5}, {"share": 0.5, "settings": {"optimizer": {"lr": 1e-4}}}]


def by_name(read: Study) -> dict[str, Subject]:
    return {subject.entry.name: subject for subject in subjects_of(read) if subject.seed == read.seeds[0]}


def test_equal_operations(tmp_path: Path) -> None:
    subjects = by_name(study(tmp_path, {"plain": {}, "lckv": LCKV}))
    plain, lckv = (subjects[name].training for name in ("plain", "lckv"))
    assert plain is not None and lckv is not None
    assert plain.run.train.train_iters == 100
    shape = model_shape(plain.run.model, vocab_size=96, seq_length=32)
    ratio = training_cost(
        shape, CompressionConfig(layer_types="0_2_2_3", forward_passes=7, backward_passes=2)
    ).ratio
    assert lckv.run.train.train_iters == round(100 / ratio) < 60
    assert lckv.all_flops == pytest.approx(plain.all_flops, rel=0.5 * ratio / 100)
    assert lckv.all_tokens == lckv.run.train.train_iters * 2 * 32


def test_equal_tokens(tmp_path: Path) -> None:
    changes = {"budget": {"iterations": 100, "model": "plain", "equal": "tokens"}}
    long = {"settings": {"train": {"seq_length": 64}}}
    subjects = by_name(study(tmp_path, {"plain": {}, "lckv": LCKV, "long": long}, **changes))
    tokens = {name: subject.training and subject.training.all_tokens for name, subject in subjects.items()}
    assert tokens == {"plain": 6400, "lckv": 6400, "long": 6400}


def test_stages_in_common_are_one_run(tmp_path: Path) -> None:
    other = [HALVES[0], {"share": 0.5, "settings": {"optimizer": {"lr": 1e-5}}}]
    models = {
        "plain": {},
        "a": {"stages": HALVES},
        "b": {"stages": other},
        "c": {"stages": HALVES, "export": "0_0_2_2"},
    }
    subjects = subjects_of(study(tmp_path, models, seeds=[1, 2]))
    runs = trainings_of(subjects)
    assert len(subjects) == 8 and len(runs) == 2 * (1 + 1 + 2)
    assert len({subject.key for subject in subjects}) == 8  # an export is a row of its own
    before = [run.key for run in runs]
    assert all(run.parent is None or before.index(run.parent.key) < place for place, run in enumerate(runs))
    assert [subject.seed for subject in subjects] == [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"logging": {"log_interval": 7}}, True),
        ({"checkpoint": {"keep_last": 1}}, True),
        ({"optimizer": {"lr": 0.5}}, False),
        ({"data": {**PLAIN["data"], "split": "9,1,0"}}, False),
    ],
)
def test_a_run_is_known_by_what_it_computes(change: dict[str, Any], same: bool, tmp_path: Path) -> None:
    keys = {
        by_name(study(tmp_path, {"plain": {}}, settings=settings))["plain"].key
        for settings in (PLAIN, {**PLAIN, **change})
    }
    assert (len(keys) == 1) == same


def test_a_row_is_known_by_how_it_is_measured_too(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")

    def key(**measure: object) -> str:
        read = study(tmp_path, {"plain": {}}, measure={"text": [str(text)], **measure})
        return by_name(read)["plain"].key

    first = key()
    assert key(clock="cpu", repeats=1) == first
    assert key(max_tokens=9) != first != key(context=8)
    text.write_text("two")
    assert key() != first


def test_a_run_is_known_by_its_data_too(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [[5, 6, 7]] * 40)
    data = {"data_path": [str(tmp_path / "data")], "num_workers": 0}
    read = study(tmp_path, {"plain": {}}, settings={**PLAIN, "data": data})
    first = by_name(read)["plain"].key
    write_dataset(tmp_path / "data", [[5, 6, 8]] * 40)
    assert by_name(read)["plain"].key != first


@pytest.mark.parametrize(("section", "key"), [("checkpoint", "resume"), ("logging", "progress_bar")])
def test_what_the_study_sets_cannot_be_set(section: str, key: str, tmp_path: Path) -> None:
    read = study(tmp_path, {"plain": {"settings": {section: {key: "x"}}}})
    with pytest.raises(ConfigError, match=f"{section}.{key} cannot be set: the study gives it to each run"):
        subjects_of(read)


def test_a_map_that_does_not_fit_is_told_with_its_model(tmp_path: Path) -> None:
    models = {"plain": {}, "b": {"settings": {"compression": {"layer_types": "0_0_9_2"}}}}
    with pytest.raises(ConfigError, match="models: b: layer_types is '0_0_9_2'; entry 2"):
        subjects_of(study(tmp_path, models))


def test_a_model_costs_what_its_own_vocabulary_makes_of_it(tmp_path: Path) -> None:
    models = {"plain": {}, "wide": {"settings": {"model": {"vocab_size": 96_000}}}}
    subjects = by_name(study(tmp_path, models))
    wide = subjects["wide"].training
    assert wide is not None and wide.run.train.train_iters < 5


def test_a_teacher_is_part_of_the_budget_and_of_the_run(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    model(vocab_size=96, max_position_embeddings=32).save_pretrained(teacher)
    settings: dict[str, Any] = {"train": {"distillation": {"teacher": str(teacher)}}}
    models: dict[str, Any] = {"plain": {}, "taught": {"settings": settings}}
    before = by_name(study(tmp_path, models))
    plain, taught = (before[name].training for name in models)
    assert plain is not None and taught is not None
    assert 60 < taught.run.train.train_iters < 95  # a forward of such a model is about a third of a step
    assert taught.all_flops == pytest.approx(plain.all_flops, rel=0.01)
    (teacher / "notes.txt").write_text("other weights")
    assert by_name(study(tmp_path, models))["taught"].key != before["taught"].key
    settings["model"] = {"vocab_size": 95}
    with pytest.raises(ConfigError, match=r"taught: train.distillation.teacher .* has a vocabulary of 96"):
        subjects_of(study(tmp_path, models))


def test_models_that_are_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models: b, seed 1, is the same as a, seed 1; leave one out"):
        subjects_of(study(tmp_path, {"a": {}, "b": {"settings": {"train": {"seq_length": 32}}}}))


def test_other_weights_in_a_folder_are_another_row(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "latest").write_text("iter_0000001")
    models = {"plain": {}, "mine": {"checkpoints": ["mine"]}}
    first = by_name(study(tmp_path, models))["mine"].key
    assert by_name(study(tmp_path, models))["mine"].key == first
    (tmp_path / "mine" / "latest").write_text("iter_0000010 ")
    assert by_name(study(tmp_path, models))["mine"].key != first


def test_models_from_elsewhere(tmp_path: Path) -> None:
    models = {"plain": {}, "mine": {"checkpoints": ["one", "two"]}}
    subjects = subjects_of(study(tmp_path, models, seeds=[5, 6, 7]))
    mine = [subject for subject in subjects if subject.entry.name == "mine"]
    assert [(subject.seed, subject.checkpoint) for subject in mine] == [
        (5, tmp_path / "one"),
        (6, tmp_path / "two"),
    ]
    assert all(subject.training is None for subject in mine)


@pytest.mark.parametrize("key", ["train.seed", "checkpoint.save", "train.train_iters"])
@pytest.mark.parametrize("dotted", [True, False])
def test_what_the_study_sets_itself(key: str, dotted: bool, tmp_path: Path) -> None:
    section, _, name = key.partition(".")
    settings = {key: "1"} if dotted else {section: {name: "1"}}
    with pytest.raises(
        ConfigError, match=f"models: plain: settings: {key} cannot be set: the study gives it"
    ):
        subjects_of(study(tmp_path, {"plain": {"settings": settings}}))


def test_a_wrong_setting_is_named_with_its_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models: b: stage 1: model.hidden_size is 'x'"):
        subjects_of(
            study(tmp_path, {"plain": {}, "b": {"stages": [{"settings": {"model": {"hidden_size": "x"}}}]}})
        )


def test_keys_hang_on_what_is_said_and_not_on_defaults() -> None:
    """So a new setting, also of a KV policy, changes no key."""
    policy = DMSConfig(stage="retrofit", window=16)
    run = replace(RunConfig(), compression=replace(RunConfig().compression, policy=policy))
    assert trainings._chosen(RunConfig()) == {}
    assert trainings._chosen(run) == {
        "compression.policy.name": "dms",
        "compression.policy.stage": "retrofit",
        "compression.policy.window": 16,
    }

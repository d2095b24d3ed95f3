"""The runs of a study: what each model's stages are, for how long, and which of them several models share."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lckv.errors import ModelError
from lckv_megatron.planning.inputs import dataset_contents, find_teacher, find_vocab_size
from lckv_megatron.study.description import Entry, Measurement, Study, Tree
from megatron_ext.command_line import config_to_dict
from megatron_ext.config import RunConfig
from megatron_ext.data.sources import find_sources
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape
from megatron_ext.model.parameters import padded_vocab_size
from megatron_ext.settings import read
from megatron_ext.summary.sizes import TeacherSizes, cost_of

_OWN = ("checkpoint.save", "checkpoint.load", "checkpoint.finetune", "checkpoint.resume", "train.train_iters",
        "train.seed", "logging.metrics_file", "logging.progress_bar")  # fmt: skip
"""Settings that the study gives each run."""

_OF_SPEED = ("repeats", "clock")
_DIGITS = 10


@dataclass(frozen=True)
class Training:
    """One run: a stage of a model with a seed. Models whose first stages are alike share them."""

    run: RunConfig
    """Without the paths that the study gives it."""

    parent: "Training | None"
    """The stage before."""

    flops: float
    """Operations of this stage, by the cost model."""

    tokens: int
    """That this stage trains on."""

    datasets: Mapping[str, str]
    """Hashes of what it reads."""

    @cached_property
    def key(self) -> str:
        """The same for runs that compute the same: from the data, and all settings but those of checkpoints
        and logging. Defaults are left out, so that a new setting changes no key."""
        parent, teacher = (
            None if self.parent is None else self.parent.key,
            self.run.train.distillation.teacher,
        )
        read: dict[str, object] = {"parent": parent, "datasets": dict(self.datasets)}
        if teacher is not None:
            read["teacher"] = _state(Path(teacher))
        return _hash({**_chosen(self.run), **read})

    @property
    def chain(self) -> "tuple[Training, ...]":
        """All stages, the first one first."""
        return (*(() if self.parent is None else self.parent.chain), self)

    @property
    def all_flops(self) -> float:
        """Of all stages."""
        return sum(stage.flops for stage in self.chain)

    @property
    def all_tokens(self) -> int:
        """Of all stages."""
        return sum(stage.tokens for stage in self.chain)


@dataclass(frozen=True)
class Subject:
    """A model with one seed: a row of the table."""

    entry: Entry
    seed: int
    training: Training | None
    """Its last stage; None: it was trained elsewhere."""

    checkpoint: Path | None
    """Of a model that was trained elsewhere."""

    measured: str
    """Stands for the texts and the way in which it is measured."""

    @property
    def key(self) -> str:
        """By which its row is known."""
        if self.training is not None:
            of_weights: object = self.training.key
        else:
            assert self.checkpoint is not None
            of_weights = _state(self.checkpoint)
        return _hash([of_weights, self.entry.export, self.measured])


def subjects_of(study: Study) -> list[Subject]:
    """All models with all seeds, the first seed first. Raises ConfigError, which names the settings that do
    not fit together."""
    unit = _Unit(study)
    made: dict[str, Training] = {}
    measured = _measured(study.measure)
    subjects: list[Subject] = []
    for place, seed in enumerate(study.seeds):
        for entry in study.models:
            if not entry.checkpoints:
                subjects.append(Subject(entry, seed, _chain(study, entry, seed, unit, made), None, measured))
            elif place < len(entry.checkpoints):
                subjects.append(Subject(entry, seed, None, entry.checkpoints[place], measured))
    known: dict[str, Subject] = {}
    for subject in subjects:
        if (twin := known.setdefault(subject.key, subject)) is not subject:
            raise ConfigError(
                f"{study.path}: models: {subject.entry.name}, seed {subject.seed}, is the same as "
                f"{twin.entry.name}, seed {twin.seed}; leave one out."
            )
    return subjects


def trainings_of(subjects: list[Subject]) -> list[Training]:
    """The runs that they need, those before that others begin with."""
    chains = (subject.training.chain for subject in subjects if subject.training is not None)
    return [*{training.key: training for chain in chains for training in chain}.values()]


def _state(checkpoint: Path) -> list[object]:
    """What changes where other weights are put into a folder."""
    files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else []
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(checkpoint), states]


def _measured(measure: Measurement) -> str:
    """The same where losses can be compared: from the texts, and from how they are read."""
    how = {name: value for name, value in asdict(measure).items() if name not in _OF_SPEED}
    texts = []
    for source in find_sources(measure.text):
        with open(source.path, "rb") as file:
            texts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return _hash([how, texts])


def _chosen(run: RunConfig) -> dict[str, object]:
    """The settings that are not the default ones, by their keys; of a KV policy its name, and those that are
    not its own default ones."""
    policy = type(run.compression.policy)()
    with_policy = replace(RunConfig(), compression=replace(RunConfig().compression, policy=policy))
    defaults = dict(_leaves(config_to_dict(with_policy), ""))
    if policy != RunConfig().compression.policy:
        del defaults["compression.policy.name"]
    return {
        key: value
        for key, value in _leaves(config_to_dict(run), "")
        if not key.startswith(("logging.", "checkpoint.")) and (key not in defaults or defaults[key] != value)
    }


def _leaves(tree: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_DIGITS]


class _Unit:
    """What a model may use, from the model that the study measures budgets by."""

    def __init__(self, study: Study) -> None:
        entry = study.entry(study.budget.model)
        run = run_of(study, entry, 0, seed=study.seeds[0], iterations=1)
        self._equal = study.budget.equal
        self._vocab_sizes: dict[object, int] = {}
        self._teachers: dict[object, float] = {}
        with _named(study, entry):
            self._total = study.budget.iterations * self._step(run)

    def iterations(self, run: RunConfig, share: float) -> int:
        """Steps of a run that make this share of the budget; at least one."""
        return max(1, round(share * self._total / self._step(run)))

    def flops_per_token(self, run: RunConfig) -> float:
        """Of a training step, with a teacher's forward."""
        vocab_size = self._vocab_size(run)
        padded = padded_vocab_size(vocab_size, run.model, run.parallel)
        shape = model_shape(run.model, vocab_size=padded, seq_length=run.train.seq_length)
        return cost_of(run, shape).model_flops + self._teacher_flops(run, vocab_size)

    def _vocab_size(self, run: RunConfig) -> int:
        key = (run.model.vocab_size, run.data)
        if key not in self._vocab_sizes:
            self._vocab_sizes[key] = find_vocab_size(run)
        return self._vocab_sizes[key]

    def _teacher_flops(self, run: RunConfig, vocab_size: int) -> float:
        key = (run.train.distillation.teacher, run.train.seq_length, run.parallel, vocab_size)
        if key not in self._teachers:
            teacher = find_teacher(run, run.parallel.replica_size, vocab_size)
            self._teachers[key] = 0.0
            if teacher is not None:
                sizes = TeacherSizes.of(teacher.run, vocab_size=vocab_size, seq_length=run.train.seq_length)
                self._teachers[key] = sizes.flops
        return self._teachers[key]

    def _step(self, run: RunConfig) -> float:
        tokens = _tokens_of_step(run)
        return tokens * (self.flops_per_token(run) if self._equal == "flops" else 1)


def _chain(study: Study, entry: Entry, seed: int, unit: _Unit, made: dict[str, Training]) -> Training:
    last: Training | None = None
    for number, stage in enumerate(entry.stages):
        probe = run_of(study, entry, number, seed=seed, iterations=1)
        with _named(study, entry):
            iterations = unit.iterations(probe, stage.share)
            flops = unit.flops_per_token(probe)
        run = run_of(study, entry, number, seed=seed, iterations=iterations)
        tokens = iterations * _tokens_of_step(run)
        training = Training(run, last, tokens * flops, tokens, dataset_contents(run))
        last = made.setdefault(training.key, training)
    assert last is not None
    return last


@contextlib.contextmanager
def _named(study: Study, entry: Entry) -> Iterator[None]:
    """Errors of settings say which model has them."""
    try:
        yield
    except (ConfigError, ModelError) as error:
        raise ConfigError(f"{study.path}: models: {entry.name}: {error}") from error


def _tokens_of_step(run: RunConfig) -> int:
    return run.train.global_batch_size * run.train.seq_length


def run_of(study: Study, entry: Entry, number: int, *, seed: int, iterations: int) -> RunConfig:
    """Stage `number` of a model, from 0. Raises ConfigError."""
    place = f"{study.path}: models: {entry.name}: "
    sources = [
        *study.base,
        (f"{place}settings: ", entry.settings),
        (f"{place}stage {number + 1}: ", entry.stages[number].settings),
    ]
    for origin, tree in sources:
        if taken := [key for key in _OWN if _gives(tree, key)]:
            raise ConfigError(f"{origin}{', '.join(taken)} cannot be set: the study gives it to each run.")
    own = {"train.train_iters": str(iterations), "train.seed": str(seed)}
    return read(RunConfig, [*sources, ("", own)])


def _gives(tree: Tree, key: str) -> bool:
    section, _, name = key.partition(".")
    inside: Any = tree.get(section)
    return key in tree or (isinstance(inside, Mapping) and name in inside)

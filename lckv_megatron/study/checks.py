"""What cannot work in a study, said before the first run, which may take days."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lckv.errors import ModelError, SettingError
from lckv.weights.folder_kind import explain_other_kind, kind_of
from lckv.weights.json_file import read_json_object
from lckv_megatron.planning.inputs import find_teacher, find_vocab_size
from lckv_megatron.study.description import Measurement
from lckv_megatron.study.trainings import Subject
from megatron_ext.command_line import config_from_dict
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.restoring.description import saved_settings
from megatron_ext.validation.run import validate


@dataclass(frozen=True)
class _Read:
    """How a model reads texts."""

    longest: int
    """Tokens of a text that it takes."""

    tokenizer: str | None = None
    """None: not known."""


def check(subjects: Sequence[Subject], measure: Measurement, processes: int) -> None:
    """`processes`: of each run. Raises ConfigError with the models that cannot be trained, could not be
    measured after it, or could not be compared."""
    problems, read = [], dict[str, _Read]()
    for subject in subjects:
        name = f"{subject.entry.name}, seed {subject.seed}"
        try:
            read[name] = _looked_at(subject, processes)
        except (ConfigError, ModelError) as error:
            problems.append(f"{name}: {error}")
            continue
        problems += [f"{name}: {problem}" for problem in _measurement_problems(read[name], measure)]
    if problems := [*problems, *_incomparable(read, measure)]:
        raise ConfigError("\n".join(problems))


def _looked_at(subject: Subject, processes: int) -> _Read:
    """Raises ConfigError or ModelError where the model cannot be trained or exported."""
    if subject.training is None:
        assert subject.checkpoint is not None
        return _trained_elsewhere(subject.checkpoint, subject.entry.export)
    for stage in subject.training.chain:
        validate(stage.run, processes)
        if stage.run.train.distillation.teacher is not None:
            find_teacher(stage.run, processes, find_vocab_size(stage.run))
    run = subject.training.run
    if run.data.tokenizer_type == "none":
        raise ConfigError(
            "data.tokenizer_type is none, so that texts could not be measured; set it, and "
            "data.tokenizer_model."
        )
    _require_export(run, subject.entry.export)
    return _Read(_longest(run), f"{run.data.tokenizer_type} {run.data.tokenizer_model}")


def _trained_elsewhere(place: Path, export: str | None) -> _Read:
    kind = kind_of(place)
    if kind == "huggingface":
        if export is not None:
            raise ConfigError(
                f"export is {export}, and {place} is a model in Hugging Face's format, which has one map: "
                "leave export out."
            )
        longest = read_json_object(place / "config.json").get("max_position_embeddings")
        if not isinstance(longest, int):
            raise ConfigError(f"{place}/config.json has no max_position_embeddings.")
        return _Read(longest)
    if kind == "megatron":
        saved = saved_settings(place)
        saved.pop("architecture", None)
        run = config_from_dict(saved)
        _require_export(run, export)
        return _Read(_longest(run))
    other = explain_other_kind(place, "huggingface")
    what = "holds no model" if place.exists() else "is not here"
    raise ConfigError(f"{other}." if other else f"checkpoints has {place}, which {what}.")


def _require_export(run: RunConfig, export: str | None) -> None:
    """Raises ConfigError where the model of `run` cannot be exported with that map."""
    try:
        run.compression.chosen(export, run.model.num_layers)
    except SettingError as error:
        lines = (f"export: {problem.value}: {problem.obstacle}." for problem in error.problems)
        raise ConfigError("\n".join(lines)) from error


def _longest(run: RunConfig) -> int:
    return run.model.max_position_embeddings or run.train.seq_length


def _measurement_problems(read: _Read, measure: Measurement) -> Iterator[str]:
    if measure.context is not None and measure.context >= read.longest:
        yield (
            f"measure.context is {measure.context}; it must be at most {read.longest - 1}, for the model "
            f"takes texts of {read.longest} tokens."
        )


def _incomparable(models: dict[str, _Read], measure: Measurement) -> Iterator[str]:
    """Why numbers of different models would be of different things."""
    longest = {read.longest for read in models.values()}
    if measure.context is None and len(longest) > 1:
        yield (
            "measure.context is not given, and models take texts of different lengths, "
            f"{', '.join(map(str, sorted(longest)))} tokens, so that losses and bytes of cache would be of "
            f"different contexts: set it, to at most {min(longest) - 1}."
        )
    tokenizers = {read.tokenizer: name for name, read in models.items() if read.tokenizer is not None}
    if len(tokenizers) > 1:
        named = "; ".join(f"{name}: {tokenizer}" for tokenizer, name in tokenizers.items())
        yield (
            "models have different tokenizers, so that losses per token would be of different tokens "
            f"({named}): give all the same data.tokenizer_model."
        )

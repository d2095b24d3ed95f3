"""What cannot work in a study, said before the first run, which may take days."""

from collections.abc import Iterator, Sequence

from lckv.errors import SettingError
from lckv_megatron.study.description import Measurement
from lckv_megatron.study.trainings import Subject, Training
from megatron_ext.errors import ConfigError
from megatron_ext.validation.run import validate


def check(subjects: Sequence[Subject], measure: Measurement, processes: int) -> None:
    """`processes`: of each run. Raises ConfigError with the models that cannot be trained, or could not be
    measured after it."""
    problems = [
        f"{subject.entry.name}, seed {subject.seed}: {problem}"
        for subject in subjects
        for problem in _problems(subject, measure, processes)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _problems(subject: Subject, measure: Measurement, processes: int) -> Iterator[str]:
    if subject.training is None:
        assert subject.checkpoint is not None
        if not subject.checkpoint.exists():
            yield f"checkpoints has {subject.checkpoint}, which is not here."
        return
    try:
        for run in subject.training.chain:
            validate(run.run, processes)
    except ConfigError as error:
        yield str(error)
        return
    yield from _measurement_problems(subject.training, subject.entry.export, measure)


def _measurement_problems(training: Training, export: str | None, measure: Measurement) -> Iterator[str]:
    run = training.run
    longest = (run.model.max_position_embeddings or run.train.seq_length) - 1
    if measure.context is not None and measure.context > longest:
        yield (
            f"measure.context is {measure.context}; it must be at most {longest}, for the model takes texts "
            f"of {longest + 1} tokens."
        )
    if run.data.tokenizer_type == "none":
        yield (
            "data.tokenizer_type is none, so that texts could not be measured; set it, and "
            "data.tokenizer_model."
        )
    try:
        run.compression.chosen(export, run.model.num_layers)
    except SettingError as error:
        yield from (f"export: {problem.value}: {problem.obstacle}." for problem in error.problems)

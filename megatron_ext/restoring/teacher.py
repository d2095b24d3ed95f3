"""The teacher of a run that distils, before its weights are read. Torch is loaded only where it is a Hugging
Face model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lckv.rope_scaling import longest_context
from lckv.weights.folder_kind import kind_of
from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.parameters import padded_vocab_size
from megatron_ext.restoring.description import Description, describe_checkpoint

if TYPE_CHECKING:
    from megatron_ext.restoring.foreign import OpenForeign


def describe_teacher(run: RunConfig, open_foreign: "Callable[[], OpenForeign]") -> Description:
    """The teacher of `run` on its layout. `open_foreign` gives what opens a Hugging Face model.

    Raises ConfigError where it cannot be described.
    """
    assert run.train.distillation.teacher is not None
    path = Path(run.train.distillation.teacher)
    try:
        if kind_of(path) != "huggingface":
            return describe_checkpoint(path, layout_of_teacher(run.parallel))
        from megatron_ext.restoring.foreign import describe_foreign

        return describe_foreign(
            path,
            open_foreign(),
            layout_of_teacher(run.parallel),
            seq_length=run.train.seq_length,
            make_vocab_size_divisible_by=run.model.make_vocab_size_divisible_by,
        )
    except ConfigError as error:
        raise ConfigError(f"train.distillation.teacher {path}: {error}") from error


def layout_of_teacher(parallel: ParallelConfig) -> ParallelConfig:
    """That of its student, without what is for the student's way and its gradients."""
    return replace(parallel, pipeline_in_flight=None, sequence_parallel=False, tp_comm_overlap=False)


def obstacle(run: RunConfig, vocab_size: int, teacher: Description) -> str | None:
    """Why the model of `run`, with so many tokens in its vocabulary, cannot learn from that teacher, as what
    follows its name; None: it can."""
    theirs = teacher.run
    if teacher.vocab_size != vocab_size:
        return (
            f"has a vocabulary of {teacher.vocab_size} tokens, the model one of {vocab_size}; take a "
            "teacher with the model's tokenizer."
        )
    padded, own = (padded_vocab_size(vocab_size, model, run.parallel) for model in (theirs.model, run.model))
    if padded != own:
        return (
            f"pads its vocabulary to {padded}, the model its own to {own}; set "
            "model.make_vocab_size_divisible_by to the teacher's, "
            f"{theirs.model.make_vocab_size_divisible_by}."
        )
    given = theirs.model.max_position_embeddings
    longest = None if given is None else longest_context(theirs.model.rope_scaling.scaling, given)
    if longest is not None and run.train.seq_length > longest:
        return f"has a context of {longest} tokens; lower train.seq_length, {run.train.seq_length}."
    mine, other = run.compression.policy, theirs.compression.policy
    if run.parallel.context_parallel_size > 1 and mine.traits.reach != other.traits.reach:
        return (
            f"has the KV policy {other.name}, the model {mine.name}, which look at different neighbours of "
            "a token; set parallel.context_parallel_size to 1."
        )
    return None

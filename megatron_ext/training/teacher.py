"""The teacher of a run that distils: another model, which makes of each micro-batch what is to be learned."""

import logging
from pathlib import Path

import torch

from lckv.losses.linear_distillation import DistillationTerms, Lesson
from megatron_ext.config import DistillationConfig, RunConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import ConfigError
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.policy_statistics import PolicyInputs
from megatron_ext.restoring.model import Restored, restore

logger = logging.getLogger(__name__)


class Teacher:
    """A trained model on the run's layout, without gradients."""

    def __init__(self, stage: SharedKVGPTModel, terms: DistillationTerms) -> None:
        self._stage, self._terms = stage.eval().requires_grad_(False), terms

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """What it makes of a micro-batch."""
        policy = PolicyInputs((), batch.counted, batch.chunk_rows)
        return Lesson(
            self._stage.teach(batch.tokens, batch.position_ids, batch.documents(), policy), self._terms
        )


def terms_of(settings: DistillationConfig) -> DistillationTerms:
    """What the run learns."""
    return DistillationTerms(settings.divergence, settings.weight, settings.lm_loss_weight)


def build_teacher(run: RunConfig, student: SharedKVGPTModel) -> Teacher | None:
    """The teacher of the run beside this rank's student; None where there is none.

    Raises ConfigError where they cannot be compared, and CheckpointError as `load_checkpoint` does.
    """
    settings = run.train.distillation
    if settings.teacher is None:
        return None
    restored = restore(Path(settings.teacher), run.parallel, verify_hashes=run.checkpoint.verify_hashes)
    if problem := _obstacle(run, student, restored):
        raise ConfigError(f"train.distillation.teacher {settings.teacher} {problem}")
    logger.info("learning from %s (iteration %d)", settings.teacher, restored.iteration)
    return Teacher(restored.stage, terms_of(settings))


def _obstacle(run: RunConfig, student: SharedKVGPTModel, restored: Restored) -> str | None:
    stage, theirs = restored.stage, restored.run
    if stage.vocab_size != student.vocab_size:
        return (
            f"has a vocabulary of {stage.vocab_size} tokens, the model one of {student.vocab_size}; take a "
            "teacher with the model's tokenizer."
        )
    if stage.padded_vocab_size != student.padded_vocab_size:
        return (
            f"pads its vocabulary to {stage.padded_vocab_size}, the model its own to "
            f"{student.padded_vocab_size}; set model.make_vocab_size_divisible_by to the teacher's, "
            f"{theirs.model.make_vocab_size_divisible_by}."
        )
    longest = theirs.model.max_position_embeddings
    if longest is not None and run.train.seq_length > longest:
        return f"has a context of {longest} tokens; lower train.seq_length, {run.train.seq_length}."
    mine, other = run.compression.policy, theirs.compression.policy
    if run.parallel.context_parallel_size > 1 and mine.traits.reach != other.traits.reach:
        return (
            f"has the KV policy {other.name}, the model {mine.name}, which look at different neighbours of "
            "a token; set parallel.context_parallel_size to 1."
        )
    return None

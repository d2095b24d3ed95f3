"""The teacher of a run that distils: another model, which makes of each micro-batch what is to be learned."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lckv.losses.linear_distillation import DistillationTerms, Lesson
from lckv.losses.linear_distillation import Teacher as Told
from lckv.weights.folder_kind import explain_other_kind, kind_of
from megatron_ext.checkpointing.errors import CheckpointError
from megatron_ext.config import DistillationConfig, RunConfig
from megatron_ext.data.batch import Batch
from megatron_ext.errors import ConfigError
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.policy_statistics import PolicyInputs, PolicyReport
from megatron_ext.model.stages import StageCall
from megatron_ext.restoring.description import Description
from megatron_ext.restoring.foreign import OpenForeign, restore_foreign
from megatron_ext.restoring.model import Restored, restore
from megatron_ext.restoring.teacher import layout_of_teacher, obstacle
from megatron_ext.schedule.forward import run_forward
from megatron_ext.schedule.micro_batches import Taught
from megatron_ext.schedule.ring import Finished
from megatron_ext.summary.sizes import TeacherSizes
from megatron_ext.validation.distillation import beyond_vocabulary

logger = logging.getLogger(__name__)

Equal = Callable[[Tensor, Tensor], bool]
"""Whether two tensors have the same numbers, of the same shape."""


@dataclass(frozen=True)
class _Reading:
    """What a stage of the teacher does with micro-batches."""

    stage: SharedKVGPTModel

    def forward(self, batch: Batch, call: StageCall | None = None) -> tuple[Tensor, PolicyReport]:
        """See `OncePassage`."""
        policy = PolicyInputs((), batch.counted, batch.chunk_rows)
        return self.stage.states(batch.tokens, batch.position_ids, batch.documents(), policy, call)

    def finish(self, _batch: Batch, output: Tensor, _report: PolicyReport) -> Finished:
        """See `OncePassage`."""
        return Finished(output, torch.zeros([], dtype=torch.int, device=output.device), output)


class Teacher:
    """A trained model on the run's layout, without gradients."""

    def __init__(
        self, stage: SharedKVGPTModel, terms: DistillationTerms, sizes: TeacherSizes | None = None
    ) -> None:
        """`sizes`: of the whole model, for reports."""
        self._stage, self._terms = stage.eval().requires_grad_(False), terms
        self.sizes = sizes
        self._reading = _Reading(self._stage)

    def __call__(self, batches: Iterator[Batch], number: int) -> Iterator[Taught]:
        """See `Teach`. On one stage a micro-batch is read when it is asked for. On several, all are read at
        once: until their turn comes, the last stage keeps the states of all, [s, b, hidden] each."""
        if self._stage.pre_process and self._stage.post_process:
            return ((batch, self._lesson(self._read(batch))) for batch in batches)
        read = deque(islice(batches, number))
        rows, length = read[0].tokens.shape
        states = run_forward(self._stage, iter(read), self._reading, number=number, shape=(length, rows))
        return self._hand_out(read, deque(states))

    def share_weights(self, student: torch.nn.Module, equal: Equal = torch.equal) -> int:
        """Take those of the student's weights that are frozen and equal to the teacher's own, whose memory is
        then free; before the student is trained, behind its loading. Returns how many bytes that is."""
        frozen = {name: weight for name, weight in student.named_parameters() if not weight.requires_grad}
        shared = 0
        for name, weight in list(self._stage.named_parameters(remove_duplicate=False)):
            other = frozen.get(name)
            if other is None or other.dtype != weight.dtype or not equal(other, weight):
                continue
            module, _, attribute = name.rpartition(".")
            setattr(self._stage.get_submodule(module), attribute, other)
            shared += other.untyped_storage().nbytes()
        if shared:
            logger.info("the teacher shares %s MiB of frozen weights", f"{shared / 2**20:,.1f}")
        return shared

    def _hand_out(self, batches: deque[Batch], states: deque[Tensor]) -> Iterator[Taught]:
        while batches:
            yield batches.popleft(), self._lesson(states.popleft()) if states else None

    @torch.no_grad()
    def _read(self, batch: Batch) -> Tensor:
        return self._reading.forward(batch)[0]

    def _lesson(self, states: Tensor) -> Lesson:
        """Of states [s, b, hidden], in the order of the student's tokens."""
        return Lesson(Told(states.flatten(0, 1), self._stage.output_weight()), self._terms)


def terms_of(settings: DistillationConfig) -> DistillationTerms:
    """What the run learns."""
    return DistillationTerms(
        settings.divergence, settings.weight, settings.lm_loss_weight, top_k=settings.top_k
    )


def build_teacher(
    run: RunConfig, student: SharedKVGPTModel, open_foreign: OpenForeign | None
) -> Teacher | None:
    """The teacher of the run beside this rank's student; None where there is none. `open_foreign` opens a
    Hugging Face model; None: checkpoints only.

    Raises ConfigError where it cannot be read, or they cannot be compared.
    """
    settings = run.train.distillation
    if settings.teacher is None:
        return None
    if settings.top_k is not None and settings.top_k > student.vocab_size:
        raise ConfigError(beyond_vocabulary(settings.top_k, student.vocab_size))
    try:
        restored = _restored(run, Path(settings.teacher), open_foreign)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise ConfigError(f"train.distillation.teacher {settings.teacher}: {error}") from error
    described = Description(restored.run, restored.stage.vocab_size)
    if problem := obstacle(run, student.vocab_size, described):
        raise ConfigError(f"train.distillation.teacher {settings.teacher} {problem}")
    logger.info("learning from %s", settings.teacher)
    sizes = TeacherSizes.of(restored.run, vocab_size=student.vocab_size, seq_length=run.train.seq_length)
    return Teacher(restored.stage, terms_of(settings), sizes)


def _restored(run: RunConfig, path: Path, open_foreign: OpenForeign | None) -> Restored:
    parallel = layout_of_teacher(run.parallel)
    if kind_of(path) != "huggingface":
        return restore(path, parallel, verify_hashes=run.checkpoint.verify_hashes)
    if open_foreign is None:
        raise ConfigError(f"{explain_other_kind(path, 'megatron')}.")
    return restore_foreign(
        path,
        open_foreign,
        parallel,
        seq_length=run.train.seq_length,
        make_vocab_size_divisible_by=run.model.make_vocab_size_divisible_by,
        timeout_minutes=run.checkpoint.load_timeout_minutes,
    )

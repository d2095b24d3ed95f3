"""Learning from a teacher: what cannot work."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from lckv.weights.folder_kind import explain_other_kind, kind_of
from megatron_ext.config import DistillationConfig, RunConfig


def distillation_problems(run: RunConfig) -> Iterator[str]:
    """What is wrong with train.distillation, one sentence each."""
    settings = run.train.distillation
    if settings.teacher is None:
        yield from _idle(settings)
        return
    yield from _no_model(settings.teacher)
    save = run.checkpoint.save
    if settings.teacher and save is not None and Path(settings.teacher).resolve() == Path(save).resolve():
        yield (
            f"train.distillation.teacher is {settings.teacher}, and so is checkpoint.save: the run would "
            "learn from its own newest checkpoint once it goes on; give another checkpoint.save."
        )
    for name in ("weight", "lm_loss_weight"):
        value = getattr(settings, name)
        if not 0 <= value < float("inf"):
            yield f"train.distillation.{name} is {value}; it must be at least 0, and finite."
    vocab_size = run.model.vocab_size
    if settings.top_k is not None and settings.top_k < 1:
        yield f"train.distillation.top_k is {settings.top_k}; it must be at least 1, or left out."
    elif settings.top_k is not None and vocab_size is not None and settings.top_k > vocab_size:
        yield beyond_vocabulary(settings.top_k, vocab_size)
    if settings.weight == 0:
        yield (
            "train.distillation.weight is 0, so nothing would be learned from the teacher; set it above 0, "
            "or leave train.distillation.teacher out."
        )
    if run.model.cross_entropy_backend not in ("auto", "chunked"):
        yield (
            f"train.distillation.teacher is set and model.cross_entropy_backend is "
            f"{run.model.cross_entropy_backend}; the loss of distillation is computed by chunked alone: set "
            "it to auto."
        )
    if run.model.cross_entropy_z_loss:
        yield (
            f"train.distillation.teacher is set and model.cross_entropy_z_loss is "
            f"{run.model.cross_entropy_z_loss}; the loss of distillation has no z-loss: set it to 0."
        )


def beyond_vocabulary(top_k: int, vocab_size: int) -> str:
    """That the vocabulary has fewer tokens than top_k."""
    return (
        f"train.distillation.top_k is {top_k} and the vocabulary has {vocab_size} tokens; set the former to "
        "at most that, or leave it out: every token counts then."
    )


def _no_model(teacher: str) -> Iterator[str]:
    """A place that holds nothing that can teach."""
    if not teacher:  # as a path it would be the working directory
        yield "train.distillation.teacher is empty; give the folder of a model, or null."
        return
    path = Path(teacher)
    kind = kind_of(path)
    if kind in ("megatron", "huggingface"):
        return
    what = "holds no model" if path.is_dir() else "is no directory"
    if kind is not None:
        yield f"train.distillation.teacher: {explain_other_kind(path, 'megatron')}."
    else:
        yield (
            f"train.distillation.teacher is {teacher}, which {what}; give a checkpoint, a directory of "
            "checkpoints, or the folder of a Hugging Face model, with config.json and safetensors."
        )


def _idle(settings: DistillationConfig) -> Iterator[str]:
    """Settings that nobody would read."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if value != entry.default:
            yield (
                f"train.distillation.{entry.name} is {value}, but there is no teacher; set "
                "train.distillation.teacher, or leave it out."
            )

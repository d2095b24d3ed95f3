"""Proof that a Megatron checkpoint and a Hugging Face model are the same: their logits of the same tokens,
both in float32."""

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
import psutil
import torch
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.layer_subset import LayerSubset, cut_description, spread_layers, with_sources
from checkpoints_conversion.megatron_logits import check_layout, compute
from checkpoints_conversion.opening import OpenModel
from checkpoints_conversion.reference import Reference, checkpoint_folder, common_dtype, reference_folder
from lckv.weights.tensors import CHUNK_BYTES, TensorSource
from megatron_ext.config import ParallelConfig

logger = logging.getLogger(__name__)

LARGEST_AUTOMATIC_PROOF = 3_000_000_000
"""Parameters up to which a conversion proves itself without being asked."""
_SAMPLED_LAYERS = 4
"""Layers of a larger model that a conversion proves, besides those that they read."""
_ROOM = 1.5
"""Memory that a proof may take, in models of float32."""


class ProofError(ArithmeticError):
    """Two models that must be equal are not, or not closely enough."""


@dataclass(frozen=True)
class Tolerance:
    """How far two models may differ that compute the same in another order."""

    difference: float = 1e-4
    """Largest |difference| of two logits, as a share of the largest |logit|. Rounding is some 1e-6 and, where
    layers are iterated, 1e-5."""

    agreement: float = 0.999
    """Least share of positions at which both hold the same token for the likeliest."""


@dataclass(frozen=True)
class Comparison:
    """What was found in all positions of all rows."""

    rows: int
    length: int
    max_difference: float
    mean_difference: float
    largest_logit: float
    agreement: float
    """Share of positions at which both models hold the same token for the likeliest."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the models are equal up to rounding; never where a number is not finite."""
        close = self.max_difference <= tolerance.difference * self.largest_logit
        return close and self.agreement >= tolerance.agreement

    def lines(self, tolerance: Tolerance) -> Iterator[str]:
        """For the user."""
        allowed = tolerance.difference * self.largest_logit
        yield f"tokens              {self.rows} x {self.length}"
        share = f"{tolerance.difference:g} of the largest |logit|, {self.largest_logit:.4g}"
        yield f"max |difference|    {self.max_difference:.3e}, at most {allowed:.3e} ({share})"
        yield f"mean |difference|   {self.mean_difference:.3e}"
        yield f"top-1 agreement     {100 * self.agreement:.3f} %, at least {100 * tolerance.agreement:g} %"
        yield f"result              {'equal' if self.within(tolerance) else 'DIFFERENT'}"


def random_tokens(vocab_size: int, *, rows: int, length: int, seed: int) -> np.ndarray:
    """int64 [rows, length], all tokens of the vocabulary equally likely."""
    return np.random.default_rng(seed).integers(vocab_size, size=(rows, length))


def compare(
    original: OpenModel,
    megatron: OpenModel,
    tokens: np.ndarray,
    *,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
    layers: tuple[int, ...] | None = None,
    timeout_seconds: float = 3600.0,
) -> Comparison:
    """Compute the logits of `tokens`, int64 [B, T], with the checkpoint `megatron` on the layout `parallel`,
    and with the Hugging Face model that `original` is or, after the conversion that made the checkpoint, must
    be.

    With `layers`, both models are cut down to these (ascending, with all whose keys and values they read; see
    `layer_subset.with_sources`), in temporary folders. Holds one model and one row of logits at a time.

    Raises ConversionError where they are different models by their settings, or the layout does not fit.
    """
    description = megatron.description
    check_layout(description if layers is None else cut_description(description, layers), parallel)
    dtype = common_dtype(original.description.dtype, description.dtype)
    with (
        reference_folder(original, megatron, layers) as folder,
        checkpoint_folder(megatron, layers) as checkpoint,
        TemporaryDirectory() as scratch,
    ):
        output = Path(scratch) / "logits.npy"
        compute(
            checkpoint,
            tokens,
            output,
            parallel,
            dtype,
            layer_types=_map_of_whole(megatron) if layers is None else None,
            timeout_seconds=timeout_seconds,
        )
        computed = np.load(output, mmap_mode="r")
        return _summary(Reference(folder, dtype), tokens, computed)


def _map_of_whole(megatron: OpenModel) -> str | None:
    """The map, of a checkpoint with the weights of a family of them."""
    if megatron.map_family is None:
        return None
    description = megatron.description
    return str(description.compression.map(description.model.num_layers))


def _summary(reference: Reference, tokens: np.ndarray, computed: np.ndarray) -> Comparison:
    """`computed`: float32 [B, T, vocabulary]."""
    largest = worst = torch.zeros(())
    total, agreeing = 0.0, 0
    for row, given in zip(tokens, computed, strict=True):
        expected = reference.logits(torch.from_numpy(np.array(row)))
        for theirs, ours in _chunks(expected, given):
            error = (theirs - ours).abs()
            worst, largest = torch.maximum(worst, error.max()), torch.maximum(largest, theirs.abs().max())
            total += error.sum(dtype=torch.float64).item()
            agreeing += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    rows, length = tokens.shape
    return Comparison(
        rows, length, worst.item(), total / computed.size, largest.item(), agreeing / tokens.size
    )


def _chunks(expected: Tensor, given: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, CHUNK_BYTES // (4 * expected.shape[-1]))
    for start in range(0, len(expected), step):
        yield expected[start : start + step], torch.from_numpy(np.array(given[start : start + step]))


def layers_to_prove(source: TensorSource, description: ModelDescription) -> tuple[int, ...]:
    """The layers of which a proof is quick and fits into the memory that is free: all, or where the model is
    too large a few and what they read; none where these are too large as well.

    `source` holds the weights of the model `description`.
    """
    compression = description.compression
    layer_types = compression.map(description.model.num_layers)
    some = spread_layers(len(layer_types), _SAMPLED_LAYERS)
    few = with_sources(layer_types, some, first_guess=compression.first_guess)
    for layers in (tuple(range(len(layer_types))), few):
        infos = LayerSubset(source, layers).infos().values()
        parameters = sum(math.prod(info.shape) for info in infos)
        fits = 4 * _ROOM * parameters < psutil.virtual_memory().available
        if len(layers) < len(layer_types):  # both models are written once more
            fits &= 2 * sum(info.nbytes for info in infos) < shutil.disk_usage(gettempdir()).free
        if parameters <= LARGEST_AUTOMATIC_PROOF and fits:
            return layers
    return ()


def prove(
    original: OpenModel,
    megatron: OpenModel,
    layers: tuple[int, ...] | None = None,
    *,
    rows: int = 2,
    length: int = 64,
) -> None:
    """Compare the models, or with `layers` these layers of them (see `compare`), on a few random tokens, and
    log what was measured; raises ProofError where they differ."""
    tolerance, description = Tolerance(), megatron.description
    longest = min(length, description.model.max_position_embeddings or length)
    tokens = random_tokens(description.vocab_size, rows=rows, length=longest, seed=1)
    comparison = compare(original, megatron, tokens, layers=layers)
    which = "" if layers is None else f", of the layers {', '.join(map(str, layers))} alone"
    logger.info(
        "logits of Megatron's and Hugging Face's model, in float32%s:\n%s",
        which,
        "\n".join(comparison.lines(tolerance)),
    )
    if not comparison.within(tolerance):
        raise ProofError(
            "the converted model does not compute what the original does; nothing was written. Please report "
            "this with config.json. (--verify never writes it all the same.)"
        )

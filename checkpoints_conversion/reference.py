"""The Hugging Face side of a proof: which model has the outputs that a Megatron checkpoint
must have, and its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from checkpoints_conversion.conversion_record import ConversionRecord, ConversionSource
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.megatron import write_checkpoint
from checkpoints_conversion.initialization import initialize
from checkpoints_conversion.layer_subset import LayerSubset, cut_description
from checkpoints_conversion.megatron_logits import round_weights
from checkpoints_conversion.opening import OpenModel
from checkpoints_conversion.writing import write_huggingface
from lckv.config import CompressionConfig
from lckv.precision import exact_products
from megatron_ext.model.architecture import architecture

_COMPRESSION = frozenset(field.name for field in fields(CompressionConfig))


def differences(first: ModelDescription, second: ModelDescription) -> dict[str, str]:
    """Everything on which outputs depend, besides weights, and in which two models differ:
    both values by the field's name."""
    ours, theirs = _defining(first), _defining(second)
    return {name: f"{ours.get(name)}, {theirs[name]}" for name in theirs if ours.get(name) != theirs[name]}


def _defining(description: ModelDescription) -> dict[str, object]:
    model, compression = description.model, description.compression
    defining = architecture(model, compression, vocab_size=description.vocab_size)
    defining["policy"] = compression.policy.settings()
    if compression.map(model.num_layers).any_cyclic:
        defining |= {
            "forward_passes": compression.forward_passes,
            "backward_passes": compression.backward_passes,
        }
    return defining


@contextmanager
def reference_folder(
    original: OpenModel, megatron: OpenModel, layers: tuple[int, ...] | None = None
) -> Iterator[Path]:
    """A Hugging Face folder with the model that `megatron` must be; where `layers` are given, cut down to
    these.

    That is `original` itself, or where a conversion gave it a sharing map or a policy, a temporary folder
    with the same done to it. Raises ConversionError where `megatron` is another model.
    """
    changed = differences(original.description, megatron.description)
    as_it_is = not changed and layers is None and original.format == "huggingface"
    if as_it_is and any(original.path.glob("*.safetensors")):
        yield original.path
        return
    source, description = original.source, original.description
    record = megatron.record
    if changed and _COMPRESSION.issuperset(changed) and record is not None and megatron.training is None:
        compression, how = megatron.description.compression, record.initialization
        if how == "svd":
            raise ConversionError(
                f"keys and values of {megatron.path} were fitted to a text (--init svd), so that "
                f"{original.path} alone does not say what they must be. Convert the checkpoint with "
                "megatron-to-hf and give the folder that it writes."
            )
        source, description, _ = initialize(source, description, compression, how or "copy")
        changed = differences(description, megatron.description)
    if changed:
        listed = "\n".join(f"  {name}: {values}" for name, values in changed.items())
        raise ConversionError(
            f"{original.path} and {megatron.path} are different models, of which the outputs cannot "
            f"agree:\n{listed}\nGive the model that the other one was made from."
        )
    if layers is not None:
        source, description = LayerSubset(source, layers), cut_description(description, layers)
    with TemporaryDirectory() as folder:
        write_huggingface(Path(folder), description, source)
        yield Path(folder)


@contextmanager
def checkpoint_folder(megatron: OpenModel, layers: tuple[int, ...] | None = None) -> Iterator[Path]:
    """The folder of the checkpoint `megatron`, or a temporary one with the given layers of it alone."""
    if layers is None:
        yield megatron.path
        return
    description = cut_description(megatron.description, layers)
    record = ConversionRecord(description, ConversionSource("megatron", str(megatron.path), {}))
    with TemporaryDirectory() as folder:
        source = LayerSubset(megatron.source, layers)
        yield write_checkpoint(Path(folder), description, source, record_json=record.to_json())


class Reference:
    """The model of a Hugging Face folder under transformers' own class or,
    where no such class knows it, LCKVLlamaForCausalLM."""

    def __init__(self, folder: Path, weights_dtype: torch.dtype) -> None:
        """Loads it in float32, its weights rounded to `weights_dtype`."""
        from transformers import AutoModelForCausalLM

        import lckv.models  # noqa: F401 - lets AutoModelForCausalLM know LCKVLlamaForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        round_weights(self._model, weights_dtype)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """float32 [T, vocabulary] of one row of tokens, int64 [T]."""
        with exact_products():
            return self._model(tokens[None], use_cache=False).logits[0].float()


def common_dtype(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The kind of numbers to which the weights of both models must be rounded to be equal."""
    kinds = {first, second}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in kinds), torch.float32)

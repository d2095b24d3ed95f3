"""Config and weights of a model as Hugging Face has them."""

import json
from pathlib import Path

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.formats.huggingface import MAX_SHARD_BYTES, write_safetensors
from checkpoints_conversion.fusion import hf_from_canonical
from lckv.families.registry import export_family, family_of
from lckv.weights.huggingface import CONFIG_NAME
from lckv.weights.tensors import TensorSource
from megatron_ext.atomic import write_file


def write_huggingface(
    folder: Path,
    description: ModelDescription,
    source: TensorSource,
    *,
    family: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights, canonical in `source`, into `folder`.

    `family` is that of the written model (default: one that stock software runs where possible, else
    lckv-llama).

    Raises ModelError where the family cannot express the model.
    """
    decoder = description.decoder()
    chosen = export_family(decoder) if family is None else family_of(family, "--family")
    config = chosen.write_config(decoder)
    tensors = hf_from_canonical(source, decoder, chosen)
    write_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=2).encode())

"""Config and weights of a model as Hugging Face has them."""

import json
from pathlib import Path

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.families.registry import export_family, family_of
from checkpoints_conversion.formats.huggingface import CONFIG_NAME, MAX_SHARD_BYTES, write_safetensors
from checkpoints_conversion.tensors import TensorSource
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
    lckv-llama); ConversionError where it cannot express the model.
    """
    chosen = export_family(description) if family is None else family_of(family)
    config = chosen.write_config(description)
    write_safetensors(folder, chosen.hf_from_canonical(source, description), max_shard_bytes=max_shard_bytes)
    write_file(folder / CONFIG_NAME, json.dumps(config, indent=2).encode())

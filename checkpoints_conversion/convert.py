"""Whole conversions: open, change, write beside the target, prove, publish."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_conversion.calibration import Calibration
from checkpoints_conversion.compression_options import changed_compression
from checkpoints_conversion.conversion_record import ConversionRecord, ConversionSource, write_record
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.extras import existing_tokenizer, export_extras
from checkpoints_conversion.export.measured import measured_in
from checkpoints_conversion.export.tokenizer import has_tokenizer
from checkpoints_conversion.formats.huggingface import MAX_SHARD_BYTES
from checkpoints_conversion.formats.megatron import write_checkpoint
from checkpoints_conversion.initialization import initialize
from checkpoints_conversion.opening import OpenModel, open_huggingface, open_legacy, open_megatron
from checkpoints_conversion.places import NO_TOKENIZER, check_export, check_huggingface, check_legacy
from checkpoints_conversion.source_card import card_facts
from checkpoints_conversion.staging import check_free, staged
from checkpoints_conversion.streams import CastSource, model_bytes, shown_progress
from checkpoints_conversion.verify import layers_to_prove, prove
from checkpoints_conversion.writing import write_huggingface
from lckv.sharing.initialization import Initialization
from lckv.weights.huggingface import CONFIG_NAME
from lckv.weights.tensors import TensorSource

ProofMode = Literal["auto", "always", "never"]
"""auto: conversions of models that fit into the memory and are not very large end with a proof."""

logger = logging.getLogger(__name__)


def hf_to_megatron(
    hf: str,
    target: Path,
    *,
    changes: Mapping[str, object] | None = None,
    how: Initialization = "average",
    calibration: Calibration | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    proof: ProofMode = "auto",
) -> ModelDescription:
    """Convert the Hugging Face model `hf`, a folder or a name on the Hub, to a checkpoint in the new folder
    `target`.

    `changes` are settings `compression.FIELD` of the new model where it differs from `hf`; `how` says where
    the keys and values of a sharing map come from, `calibration` on which text "svd" fits them. Weights are
    cast to `dtype` (default: left as they are).
    Returns what was written.

    Raises ConversionError, CheckpointError, ProofError; then nothing is left in or beside `target`.
    """
    check_free(target)
    folder = check_huggingface(hf)
    model = open_huggingface(folder, allow_pickle=allow_pickle)
    tokens = None if calibration is None else _calibration_tokens(calibration, folder, model, how)
    name = hf if not Path(hf).exists() else str(folder.absolute())
    tokenizer = model.tokenizer if has_tokenizer(folder) else None
    return to_megatron(
        model,
        target,
        name=name,
        changes=changes or {},
        how=how,
        tokens=tokens,
        calibration=None if calibration is None else calibration.to_json(),
        dtype=dtype,
        tokenizer=tokenizer,
        proof=proof,
    )


def to_megatron(
    model: OpenModel,
    target: Path,
    *,
    name: str,
    changes: Mapping[str, object],
    how: Initialization,
    dtype: torch.dtype | None,
    tokenizer: str | None,
    proof: ProofMode,
    tokens: Tensor | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> ModelDescription:
    """Convert an opened model, called `name` in the record, to a checkpoint; see `hf_to_megatron`."""
    compression = changed_compression(model.description.compression, changes)
    source, description, done = initialize(model.source, model.description, compression, how, tokens)
    description = replace(description, dtype=dtype or description.dtype)
    logger.info("hashing %s, %.1f MB", model.path, model_bytes(model.source) / 1e6)
    record = ConversionRecord(
        description,
        ConversionSource(model.format, name, model.hashes()),
        initialization=done,
        calibration=calibration,
        tokenizer=tokenizer,
        card=card_facts(model.path) or None,
        previous=model.record,
    )
    with staged(target, model_bytes(source)) as staging:
        with shown_progress(source, "converting") as counted:
            write_checkpoint(staging, description, counted, dtype=dtype, record_json=record.to_json())
        command = f"--hf-path {name} --megatron-path {target}"
        family, first, proven = compression.family(description.model.num_layers), None, description
        if family.only is None:  # proven with its first map
            first = str(family.first)
            proven = replace(description, compression=compression.with_map(family.first))
            command += f" --layer-types {first}"
        if layers := _layers_to_prove(proof, source, proven, command):
            if done == "svd":  # no function of the original alone: compared with what was to be written
                model = replace(model, format="megatron", source=source, description=description)
            written = open_megatron(staging, layer_types=first, verify_hashes=False)
            prove(model, written, _unless_all(layers, description))
    logger.info("wrote %s", target)
    return description


def _calibration_tokens(
    calibration: Calibration, folder: Path, model: OpenModel, how: Initialization
) -> Tensor:
    if how != "svd":
        raise ConversionError(
            f"--calibration-text is given, but --init is {how}, which reads no text: leave it out, or give "
            "--init svd."
        )
    longest = model.description.model.max_position_embeddings
    assert longest is not None
    return calibration.tokens(folder, longest)


def legacy_to_megatron(
    legacy: Path,
    target: Path,
    *,
    vocab_size: int | None = None,
    given: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    proof: ProofMode = "auto",
) -> ModelDescription:
    """Convert a checkpoint in Megatron's older layout to one of this project in the new folder `target`.

    `vocab_size`, the true one, and the arguments `given` by name go before what the checkpoint says of
    itself. Otherwise as `hf_to_megatron`.
    """
    check_legacy(legacy, target, tokenizer)
    model = open_legacy(legacy, vocab_size=vocab_size, given=given)
    return to_megatron(
        model,
        target,
        name=str(model.path.absolute()),
        changes={},
        how="copy",
        dtype=dtype,
        tokenizer=None if tokenizer is None else str(tokenizer.absolute()),
        proof=proof,
    )


def megatron_to_hf(
    megatron: Path,
    target: Path,
    *,
    layer_types: str | None = None,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    metrics_file: Path | None = None,
    proof: ProofMode = "auto",
) -> ModelDescription:
    """Convert a checkpoint of this project, of any layout, to a Hugging Face model in the new folder
    `target`.

    `megatron` is one checkpoint, or a directory of them: then the newest good one. `layer_types`: the
    map, of a checkpoint that was trained with a family of them. `family` is that of the written model
    (default: one that stock software runs where possible, else lckv-llama). The tokenizer is by default that
    of the run, or of the model that was converted for it; there is none where it is `NO_TOKENIZER`.
    `metrics_file`, by default the run's, tells what was measured. Returns what was written.

    Raises ConversionError, CheckpointError, ProofError; then nothing is left in or beside `target`.
    """
    check_export(megatron, target, tokenizer)
    model = open_megatron(megatron, layer_types=layer_types)
    place = _tokenizer_place(tokenizer, model)
    source = model.source if dtype is None else CastSource(model.source, dtype)
    description = replace(model.description, dtype=dtype or model.description.dtype)
    record = ConversionRecord(
        description,
        ConversionSource("megatron", str(model.path.absolute()), model.hashes()),
        tokenizer=place,
        training=model.training,
        previous=model.record,
    )
    metrics_file = metrics_file or (Path(model.metrics_file) if model.metrics_file else None)
    measured = measured_in(model.training, model.record, metrics_file)
    with staged(target, model_bytes(source)) as staging:
        with shown_progress(source, "converting") as counted:
            write_huggingface(staging, description, counted, family=family, max_shard_bytes=max_shard_bytes)
        write_record(staging, record.without_places())
        origin = _huggingface_origin(model)
        export_extras(staging, description, record, name=target.name, source_folder=origin, measured=measured)
        command = f"--hf-path {target} --megatron-path {megatron}"
        command += f" --layer-types {layer_types}" if layer_types else ""
        if layers := _layers_to_prove(proof, source, description, command):
            prove(open_huggingface(staging), model, _unless_all(layers, description))
    logger.info("wrote %s", target)
    return description


def _layers_to_prove(
    proof: ProofMode, source: TensorSource, description: ModelDescription, command: str
) -> tuple[int, ...]:
    """The layers of the model with which a conversion shall end its proof; where these are not all, says how
    to have the proof of all."""
    every = tuple(range(description.model.num_layers))
    if proof != "auto":
        return every if proof == "always" else ()
    layers = layers_to_prove(source, description)
    if layers != every:
        logger.info(
            "the model is large, so %s; prove all of it, a few layers at a time, with: lckv-megatron convert "
            "verify --layers-at-once 2 %s",
            f"{len(layers)} of its {len(every)} layers are proven" if layers else "nothing of it is proven",
            command,
        )
    return layers


def _unless_all(layers: tuple[int, ...], description: ModelDescription) -> tuple[int, ...] | None:
    """What `prove` takes: None for a whole model, of which no copy is needed."""
    return None if len(layers) == description.model.num_layers else layers


def _tokenizer_place(given: Path | None, model: OpenModel) -> str | None:
    """Where the tokenizer of an exported model comes from. Raises ConversionError where the one that is known
    is gone: before anything is converted."""
    if given == NO_TOKENIZER:
        return None
    if given is not None:
        return str(given.absolute())
    return None if model.tokenizer is None else str(existing_tokenizer(model.tokenizer))


def _huggingface_origin(model: OpenModel) -> Path | None:
    """The Hugging Face folder with which the history of a model began, if it is here and its tokenizer is
    still the model's: what it says of sampling holds for the model too."""
    first = model.record
    if first is None:
        return None
    while first.previous is not None:
        first = first.previous
    places = [place for place in (first.source.path, first.tokenizer) if place and Path(place).is_absolute()]
    if model.tokenizer not in (None, *places):
        return None
    for place in map(Path, places):
        if (place / CONFIG_NAME).is_file():
            return place
    if first.source.format == "huggingface" and places:
        logger.warning(
            "%s, from which the model comes, is not there any more: its generation_config.json and the files "
            "of its license are left out; copy them by hand.",
            places[0],
        )
    return None

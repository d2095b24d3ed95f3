"""A stored model of any format, opened: what it is, and its weights under canonical names, of which nothing
is read yet."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from checkpoints_conversion.conversion_record import ConversionRecord, SourceFormat, hash_weights, read_record
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.measured import of_map
from checkpoints_conversion.fusion import canonical_from_hf
from checkpoints_conversion.shared_map import SharedMapSource
from lckv.families.registry import describe, family_of
from lckv.weights.checks import CheckedSource
from lckv.weights.folder_kind import explain_other_kind, kind_of
from lckv.weights.huggingface import CONFIG_NAME, HuggingFaceFolder, read_config_file
from lckv.weights.json_file import read_json_object
from lckv.weights.tensors import TensorSource
from megatron_ext.checkpointing.errors import CheckpointError
from megatron_ext.checkpointing.folders import find_candidates
from megatron_ext.restoring.chosen_map import chosen_map

logger = logging.getLogger(__name__)

_RUN_SECTIONS = ("train", "optimizer", "data")
_WEIGHTS = ".distcp"
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class OpenModel:
    """A stored model."""

    format: SourceFormat
    path: Path
    """Its folder; of a Megatron checkpoint that of the iteration."""

    description: ModelDescription
    source: TensorSource
    """Canonical tensors; reading refuses NaN and infinity."""

    hashes: Callable[[], Mapping[str, str]]
    """sha256 of the files of weights by their names; may read all of them."""

    stored_vocab_size: int | None = None
    """Rows of the embedding as it is stored, padding included, where that is known."""

    record: ConversionRecord | None = None
    """Of the conversion that made it, or made what its training started from, if there was one."""

    training: Mapping[str, Any] | None = None
    """Of a checkpoint that a run has saved: its `progress`, and the run's settings `train`,
    `optimizer` and `data`."""

    tokenizer: str | None = None
    """Folder or file of the tokenizer, where one is known; it need not be there any more."""

    metrics_file: str | None = None
    """Reports of the run that saved it, where it wrote them into a file."""

    map_family: str | None = None
    """The family of maps that it was trained with; the description and the source are those of one of
    them."""


def format_of(path: Path) -> SourceFormat:
    """What kind of model lies in the folder `path`. Raises ConversionError where it is none."""
    kind = kind_of(path)
    if kind == "huggingface" or kind == "megatron" or kind == "megatron-legacy":
        return kind
    if other := explain_other_kind(path, "huggingface"):
        raise ConversionError(f"{other}.")
    raise ConversionError(
        f"{path} holds no model: neither {CONFIG_NAME} (Hugging Face), nor iter_0000100 or the like (this "
        "project's checkpoints), nor mp_rank_00 or the like (Megatron's older layout)."
    )


def open_huggingface(folder: Path, *, allow_pickle: bool = False) -> OpenModel:
    """The model of a Hugging Face folder.

    Raises ModelError that names the field, file or tensor that cannot be converted.
    """
    if other := explain_other_kind(folder, "huggingface"):
        raise ConversionError(f"{other}.")
    weights = HuggingFaceFolder(folder, allow_pickle=allow_pickle)
    decoder = describe(read_config_file(folder), weights.infos(), folder / CONFIG_NAME)
    description = ModelDescription.of_decoder(decoder)
    return OpenModel(
        "huggingface",
        folder,
        description,
        canonical_from_hf(CheckedSource(weights, folder), decoder, family_of(decoder.family), folder),
        hashes=lambda: hash_weights(folder, weights.files),
        stored_vocab_size=description.vocab_size,
        record=read_record(folder),
        tokenizer=str(folder.absolute()),
    )


def open_megatron(path: Path, *, layer_types: str | None = None, verify_hashes: bool = True) -> OpenModel:
    """The newest good checkpoint that `path` means, its files checked against their hashes. Of one that was
    trained with a family of maps, the model with the map `layer_types`.

    What a conversion knew of the model, and training does not, is taken from where training started. Raises
    ModelError or CheckpointError.
    """
    from checkpoints_conversion.formats.megatron import (
        MegatronCheckpoint,  # with Megatron, which takes seconds
    )

    checkpoint = MegatronCheckpoint(path, verify_hashes=verify_hashes)
    record, description = checkpoint.conversion, checkpoint.description
    source: TensorSource = CheckedSource(checkpoint, checkpoint.path)
    training, layers = None, description.model.num_layers
    family = description.compression.family(layers)
    compression = chosen_map(checkpoint.path, description.compression, layers, layer_types)
    description = replace(description, compression=compression)
    if family.only is None:
        projection = compression.policy.traits.projection
        source = SharedMapSource(source, description.model, compression.map(layers), "copy", projection)
    if record is None:
        settings = checkpoint.settings
        training = {"progress": checkpoint.progress, **{name: settings.get(name) for name in _RUN_SECTIONS}}
        if family.only is None:
            training = of_map(training, str(compression.map(layers)), str(family))
        record = _origin(checkpoint.path, settings)
        if record is not None:
            known = record.description
            description = replace(description, family=known.family, token_ids=known.token_ids)
    return OpenModel(
        "megatron",
        checkpoint.path,
        description,
        source,
        hashes=lambda: {
            name: entry.sha256 for name, entry in checkpoint.manifest.files.items() if name.endswith(_WEIGHTS)
        },
        stored_vocab_size=_stored_vocab_size(checkpoint.contents),
        record=record,
        training=training,
        tokenizer=_tokenizer(checkpoint.settings, record),
        metrics_file=(checkpoint.settings.get("logging") or {}).get("metrics_file"),
        map_family=None if family.only else str(family),
    )


def _stored_vocab_size(contents: Metadata) -> int | None:
    embedding = contents.state_dict_metadata.get(_EMBEDDING)
    return embedding.size[0] if isinstance(embedding, TensorStorageMetadata) else None


def _origin(checkpoint: Path, settings: Mapping[str, Any]) -> ConversionRecord | None:
    """The record of the conversion that a run started from, also by way of other runs; None where there was
    none, or it is gone."""
    seen = {checkpoint.parent.absolute()}
    while (loaded := (settings.get("checkpoint") or {}).get("load")) is not None:
        try:
            before = find_candidates(Path(loaded)).checkpoints[0]
            if before.parent.absolute() in seen:
                return None
            seen.add(before.parent.absolute())
            if (record := read_record(before)) is not None:
                return record
            settings = read_json_object(before / CONFIG_NAME)
        except (CheckpointError, ConversionError, OSError, ValueError) as error:
            logger.warning(
                "where the run of %s started from cannot be followed further back: %s", checkpoint, error
            )
            return None
    return None


def _tokenizer(settings: Mapping[str, Any], record: ConversionRecord | None) -> str | None:
    """The tokenizer that the run was trained with, or where that is gone or unknown that of the model that
    was converted."""
    named = [
        (settings.get("data") or {}).get("tokenizer_model"),
        None if record is None else record.tokenizer,
    ]
    known = [name for name in named if name is not None]
    return next((name for name in known if Path(name).exists()), next(iter(known), None))


def open_legacy(
    path: Path, *, vocab_size: int | None = None, given: Mapping[str, object] | None = None
) -> OpenModel:
    """A checkpoint in Megatron's older layout; `vocab_size`, the true one, and the arguments `given` by name
    go before what it says of itself. Raises ConversionError."""
    if other := explain_other_kind(path, "megatron-legacy"):
        raise ConversionError(f"{other}.")
    from checkpoints_conversion.formats.megatron_legacy import LegacyCheckpoint

    checkpoint = LegacyCheckpoint(path, vocab_size=vocab_size, given=given)
    return OpenModel(
        "megatron-legacy",
        checkpoint.path,
        checkpoint.description,
        CheckedSource(checkpoint, checkpoint.path),
        hashes=lambda: hash_weights(checkpoint.path, checkpoint.files),
    )


def open_model(
    path: Path,
    *,
    allow_pickle: bool = False,
    vocab_size: int | None = None,
    given: Mapping[str, object] | None = None,
    layer_types: str | None = None,
) -> OpenModel:
    """The model in the folder `path`, of whichever format; files are not checked against their hashes.
    `vocab_size` and `given` are those of `open_legacy`, `layer_types` that of `open_megatron`.

    Raises ModelError, and ConversionError where they are given for a model of another format.
    """
    kind = format_of(path)
    if layer_types is not None and kind != "megatron":
        raise ConversionError(
            f"--layer-types is {layer_types}, which is for checkpoints that were trained with a family of "
            f"maps, and {path} is none: leave it out."
        )
    if kind == "megatron-legacy":
        return open_legacy(path, vocab_size=vocab_size, given=given)
    if vocab_size is not None or given:
        raise ConversionError(
            f"--vocab-size and --argument are for checkpoints in Megatron's older layout, and {path} is "
            "none. Leave them out: it says all of that itself."
        )
    if kind == "huggingface":
        return open_huggingface(path, allow_pickle=allow_pickle)
    return open_megatron(path, layer_types=layer_types, verify_hashes=False)

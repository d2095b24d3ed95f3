"""The project's own checkpoints: read whatever the layout that saved them, and written for any layout that
will load them.

Neither needs process groups, and neither holds more of a model than the rows that it is asked for.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from checkpoints_conversion.conversion_record import RECORD_NAME as CONVERSION_NAME
from checkpoints_conversion.conversion_record import ConversionRecord
from checkpoints_conversion.conversion_record import read_record as read_conversion
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.distcp import stored_tensors, write_tensors
from checkpoints_conversion.formats.pieces import Piece, join_rows
from checkpoints_conversion.staging import check_free
from lckv.weights.checks import check_tensors
from lckv.weights.json_file import read_json_object
from lckv.weights.tensors import TensorInfo, TensorSource
from megatron_ext.atomic import sync_file, write_file
from megatron_ext.checkpointing import folders
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.manifest import (
    Layout,
    Manifest,
    find_wrong_hashes,
    hash_files,
    list_files,
    write_manifest,
)
from megatron_ext.checkpointing.verification import CONFIG_NAME, PROGRESS_NAME, find_problems, large_files
from megatron_ext.command_line import config_from_dict, config_to_dict
from megatron_ext.config import RunConfig, TrainConfig
from megatron_ext.model.architecture import architecture
from megatron_ext.precision import precision_for

MODEL_FILE_NAME = "model.yaml"
"""Beside the checkpoints that a conversion writes: the sections `model` and `compression` of a run that
trains the model."""
DEFAULT_FAMILY = "llama"
"""Of a checkpoint that does not say where its model comes from."""
Progress = Callable[[int, int], None]
"""Told the bytes done since the last call, and how many there are in all."""

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_NORMS = (
    # Megatron keeps a norm with the linear layer behind it, where Transformer Engine has both in one module.
    (
        re.compile(r"(decoder\.layers\.\d+\.)self_attention\.linear_(?:qkv|q)\.layer_norm_(weight)"),
        r"\1input_layernorm.\2",
    ),
    (re.compile(r"(decoder\.layers\.\d+\.)mlp\.linear_fc1\.layer_norm_(weight)"), r"\1pre_mlp_layernorm.\2"),
)

logger = logging.getLogger(__name__)


def canonical_name(key: str) -> str:
    """The name that a tensor of Megatron's has here (see `tensors.py`)."""
    for pattern, name in _NORMS:
        if pattern.fullmatch(key):
            return pattern.sub(name, key)
    return key


class MegatronCheckpoint:
    """A checkpoint's model weights under canonical names (a TensorSource), in the dtype of the model that was
    trained: where that is bfloat16, float32 main weights stay behind
    with the rest of the optimizer's state."""

    def __init__(self, path: Path, *, verify_hashes: bool = True, progress: Progress | None = None) -> None:
        """`path` is what `checkpoint.load` takes: one checkpoint, or a directory of them, of which the newest
        good one is read.

        `progress` is told of the checking of hashes. Raises CheckpointError where there is no good
        checkpoint, ConversionError where its weights are not those of the model that its settings describe.
        """
        self.path, self.manifest = _choose(Path(path), verify_hashes, progress)
        """The folder of the checkpoint, and what its files are."""

        self.settings = read_json_object(self.path / CONFIG_NAME)
        """The run that made it."""

        self.progress = read_json_object(self.path / PROGRESS_NAME)
        """How far that run was."""

        self.conversion: ConversionRecord | None = (
            read_conversion(self.path) if CONVERSION_NAME in self.manifest.files else None
        )
        """Where it comes from, if a conversion has written it."""

        self.contents = read_contents(self.path)
        """Which tensors it has, and where they lie."""

        stored = stored_tensors(self.path, self.contents, lambda key: not key.startswith("optimizer."))
        self._stored = {canonical_name(key): entry for key, entry in stored.items()}
        expected = self.description.expected_tensors()
        infos = {name: without_padding(name, info, expected) for name, (info, _) in self._stored.items()}
        check_tensors(infos, expected, self.path)
        self._infos = {name: infos[name] for name in expected}

    @property
    def iteration(self) -> int:
        """Optimizer steps done."""
        return self.manifest.iteration

    @cached_property
    def description(self) -> ModelDescription:
        """The model. Family and special tokens are known where a conversion has written the checkpoint."""
        try:
            run = config_from_dict({name: self.settings[name] for name in ("model", "compression", "train")})
            vocab_size = self.settings["architecture"]["vocab_size"]
        except KeyError as error:
            raise ConversionError(
                f"{self.path / CONFIG_NAME} has no section or field {error}; it is needed to know the model. "
                "Give a checkpoint that this project's training or conversion has saved."
            ) from error
        length = run.model.max_position_embeddings or run.train.seq_length
        origin = None if self.conversion is None else self.conversion.description
        return ModelDescription(
            model=replace(run.model, vocab_size=vocab_size, max_position_embeddings=length),
            compression=run.compression,
            family=DEFAULT_FAMILY if origin is None else origin.family,
            dtype=self._stored[_VOCABULARY[0]][0].dtype if _VOCABULARY[0] in self._stored else torch.float32,
            token_ids={} if origin is None else origin.token_ids,
        )

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, from the embedding to the output layer."""
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`; vocabulary padding is left out."""
        pieces: list[Piece] = self._stored[name][1]
        return join_rows(pieces, self._infos[name], rows)


def _choose(path: Path, verify_hashes: bool, progress: Progress | None) -> tuple[Path, Manifest]:
    def verify(checkpoint: Path) -> tuple[Manifest | None, list[str]]:
        manifest, problems = find_problems(checkpoint)
        if manifest is not None and verify_hashes and not problems:
            sizes = large_files(manifest)
            told = None if progress is None else lambda count: progress(count, sum(sizes.values()))
            problems = find_wrong_hashes(checkpoint, manifest, sizes, told)
        return manifest, problems

    checkpoint, manifest, fallback = folders.choose_checkpoint(path, folders.find_candidates(path), verify)
    if fallback is not None:
        logger.warning("%s", fallback)
    return checkpoint, manifest


def without_padding(name: str, info: TensorInfo, expected: Mapping[str, TensorInfo]) -> TensorInfo:
    """A vocabulary's tensor without the rows that pad it; others as they are."""
    if name in _VOCABULARY and name in expected and info.shape and info.shape[0] > expected[name].shape[0]:
        return replace(info, shape=(expected[name].shape[0], *info.shape[1:]))
    return info


def write_checkpoint(
    directory: Path,
    description: ModelDescription,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    iteration: int = 0,
    record_json: Mapping[str, Any],
    progress: Progress | None = None,
) -> Path:
    """Writes weights as a checkpoint in the new or empty folder `directory`, such as `staged` gives; returns
    the checkpoint's own folder.

    `restore` and `checkpoint.finetune` load it on every layout; there is no optimizer in it, so a run cannot
    be resumed from it. The tensors of `source`, which has those of `description`, are read in rows of some 32
    MiB, cast to `dtype` (default: left as they are) and forgotten. `record_json` is the content of
    conversion.json. Where it fails or is stopped, what it has written is left to the caller.

    Raises ConversionError where the folder is not empty, ModelError where tensors are missing.
    """
    from megatron_ext.checkpointing.state import (
        common_file,
        write_common,
    )  # with Megatron: reading has no need

    directory = Path(directory)
    if dtype is not None:
        description = replace(description, dtype=dtype)
    infos = {name: replace(info, dtype=dtype or info.dtype) for name, info in source.infos().items()}
    expected = description.expected_tensors()
    check_tensors(infos, expected, "the model to write")
    check_free(directory)
    staging, sequence = folders.prepare_staging(directory, iteration, 0)
    files = _write_weights(staging, {name: infos[name] for name in expected}, source, progress)
    settings = _settings(description)
    contents = {
        CONFIG_NAME: settings,
        PROGRESS_NAME: {"iteration": iteration, "consumed_samples": 0, "consumed_tokens": 0},
        CONVERSION_NAME: record_json,
    }
    for name, content in contents.items():
        write_file(staging / name, json.dumps(content, indent=1).encode())
    write_common(staging, common_file({}))
    others = [name for name in list_files(staging) if name not in files]
    for name in others:
        sync_file(staging / name)
    files = dict(sorted({**files, **hash_files(staging, others)}.items()))
    write_manifest(staging, Manifest(iteration, sequence, Layout("cpu", 1, 1, 1, 1, 1), files))
    _write_model_file(directory / MODEL_FILE_NAME, settings)
    return folders.publish(staging, iteration)


def _write_weights(
    staging: Path, infos: Mapping[str, TensorInfo], source: TensorSource, progress: Progress | None
) -> dict[str, Any]:
    """Writes the tensors under Megatron's keys; returns size and hash of the files."""
    total = sum(info.nbytes for info in infos.values())
    names = megatron_keys(infos)

    def read(key: str, rows: slice) -> Tensor:
        name = names[key]
        tensor = source.read(name, rows).to(infos[name].dtype)
        if progress is not None:
            progress(tensor.nbytes, total)
        return tensor

    return write_tensors(staging, {key: infos[name] for key, name in names.items()}, read)


def megatron_keys(names: Collection[str]) -> dict[str, str]:
    """The canonical `names` of all tensors of a model, by the keys that checkpoints have them under. The
    inverse of `canonical_name`."""
    return {_megatron_key(name, names): name for name in names}


def _megatron_key(name: str, names: Collection[str]) -> str:
    layer, _, norm = name.partition("input_layernorm.")
    if norm:
        computes_kv = f"{layer}self_attention.linear_qkv.weight" in names
        return f"{layer}self_attention.linear_{'qkv' if computes_kv else 'q'}.layer_norm_{norm}"
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def _settings(description: ModelDescription) -> dict[str, Any]:
    """config.json: a run with the model, and with defaults otherwise.
    It computes with numbers that can hold the weights."""
    train = TrainConfig(
        precision=precision_for(description.dtype).name,
        seq_length=description.model.max_position_embeddings or TrainConfig.seq_length,
    )
    run = RunConfig(model=description.model, compression=description.compression, train=train)
    defining = architecture(description.model, description.compression, vocab_size=description.vocab_size)
    return {**config_to_dict(run), "architecture": defining}


def _write_model_file(path: Path, settings: Mapping[str, Any]) -> None:
    sections = {name: settings[name] for name in ("model", "compression")}
    write_file(path, yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).encode())

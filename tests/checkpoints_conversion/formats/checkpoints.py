"""Tiny models with random weights, saved by this project's training code on any layout; runs inside a
rank."""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.conversion_record import ConversionRecord, ConversionSource
from checkpoints_conversion.description import ModelDescription
from lckv.config import CompressionConfig
from megatron_ext.checkpointing.save import save_checkpoint
from megatron_ext.command_line import config_to_dict
from megatron_ext.config import ParallelConfig, RunConfig, TrainConfig
from megatron_ext.model.architecture import architecture
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.initialization import global_parameters, shard
from tests.megatron_ext.model.stages import EVERY_MAP, MODEL, VOCAB, make_stage

LENGTH = 32
TRAIN = TrainConfig(precision="fp32", seq_length=LENGTH)
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def describe(
    compression: CompressionConfig, dtype: torch.dtype = torch.float32, **model: Any
) -> ModelDescription:
    """The description of a stage of `make_stage`."""
    config = replace(MODEL, vocab_size=VOCAB, max_position_embeddings=LENGTH, **model)
    return ModelDescription(config, compression, "llama", dtype)


QWEN = {"add_qkv_bias": True, "qk_layernorm": True, "untie_embeddings_and_output_weights": False}
CASES = {
    "plain": describe(EVERY_MAP["plain"]),
    "cla, biases, norms, tied": describe(EVERY_MAP["cla"], **QWEN),
    "lckv": describe(EVERY_MAP["lckv"]),
    "yoco": describe(EVERY_MAP["yoco"]),
    "dmc": describe(EVERY_MAP["dmc"]),
    "lckv x dmc": describe(EVERY_MAP["lckv x dmc"]),
}


def whole_weights(description: ModelDescription) -> dict[str, Tensor]:
    """All weights, norms and biases too, drawn at random."""
    weights = {}
    for name, info in description.expected_tensors().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weights[name] = torch.randn(info.shape, generator=generator).mul(0.2).to(info.dtype)
    return weights


def stage_with(description: ModelDescription, parallel: ParallelConfig) -> SharedKVGPTModel:
    """This rank's stage with `whole_weights`; vocabulary padding holds large numbers. Initialises process
    groups."""
    fields = {name: getattr(description.model, name) for name in QWEN}
    stage = make_stage(description.compression, parallel, TRAIN, **fields)
    weights = whole_weights(description)
    with torch.no_grad():
        for name, parameter in global_parameters(stage):
            whole_name = _untied(name, stage)
            parameter.copy_(shard(stage, whole_name, weights[whole_name]))
            if whole_name in (EMBEDDING, OUTPUT):
                first = stage.pg_collection.tp.rank() * len(parameter)
                parameter[max(0, VOCAB - first) :] = 1e6
    return stage


def different_weights(stage: SharedKVGPTModel, description: ModelDescription) -> list[str]:
    """The stage's parameters that are not this rank's part of `whole_weights`."""
    weights, found = whole_weights(description), []
    for name, parameter in global_parameters(stage):
        whole_name = _untied(name, stage)
        part = shard(stage, whole_name, weights[whole_name])
        first = stage.pg_collection.tp.rank() * len(parameter)
        true = max(0, VOCAB - first) if whole_name in (EMBEDDING, OUTPUT) else len(parameter)
        if not torch.equal(parameter[:true], part[:true]):
            found.append(name)
    return found


def _untied(name: str, stage: SharedKVGPTModel) -> str:
    """A tied output layer on a stage of its own is a copy of the embedding."""
    return EMBEDDING if name == OUTPUT and stage.share_embeddings_and_output_weights else name


def save(stage: SharedKVGPTModel, description: ModelDescription, directory: Path, iteration: int = 7) -> None:
    """As a training run saves it, but for the optimizer."""
    run = RunConfig(model=description.model, compression=description.compression, train=TRAIN)
    defining = architecture(description.model, description.compression, vocab_size=VOCAB)
    save_checkpoint(
        directory,
        iteration,
        model=[stage],
        optimizer=None,
        scheduler=None,
        progress={"iteration": iteration, "consumed_samples": 28, "consumed_tokens": 896},
        config={**config_to_dict(run), "architecture": defining},
    )


def manifest_of(description: ModelDescription) -> ConversionRecord:
    """As of a conversion from Hugging Face."""
    return ConversionRecord(
        description, ConversionSource("huggingface", "somewhere", {"model.safetensors": "00"})
    )

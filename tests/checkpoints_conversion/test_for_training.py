"""A Hugging Face model on the layout of a run, read where it lies: bit for bit the numbers that come by way
of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.for_training import open_for_training
from megatron_ext.config import ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.restoring.foreign import restore_foreign
from megatron_ext.restoring.model import restore
from tests.lckv.families.tiny_models import saved_model
from tests.ranks import run_on_ranks

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biased": ("qwen2", {"dtype": torch.bfloat16}, {}),
    "sharing": ("qwen3", {}, {"compression.layer_types": "1_1_2_2", "compression.first_guess": True}),
}
"""Family, settings, and what a conversion changes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Hugging Face folders, and the checkpoint that is made of each."""
    places = []
    for name, (family, settings, changes) in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        model, checkpoint = folder / "model", folder / "checkpoint"
        saved_model(model, family, num_hidden_layers=4, **settings)
        hf_to_megatron(str(model), checkpoint, changes=changes, proof="never")
        if changes:
            model = folder / "exported"
            megatron_to_hf(checkpoint, model, proof="never")
        places.append((model, checkpoint))
    return places


def differences(places: list[tuple[Path, Path]], parallel: ParallelConfig) -> list[str]:
    """On every rank: parameters that are not the same numbers of the same kind."""
    from megatron_ext.parallel.process_groups import initialize

    initialize(parallel, 1)
    different = []
    for model, checkpoint in places:
        here = restore_foreign(
            model, open_for_training, parallel,
            seq_length=16, make_vocab_size_divisible_by=128, timeout_minutes=1,
        ).stage  # fmt: skip
        there = dict(restore(checkpoint, parallel).stage.named_parameters())
        assert there.keys() == dict(here.named_parameters()).keys()
        different += [
            f"{model}: {name}"
            for name, parameter in here.named_parameters()
            if parameter.dtype != there[name].dtype or not torch.equal(parameter, there[name])
        ]
    return different


@pytest.mark.parametrize(("tensor", "pipeline", "ranks"), [(1, 1, 2), (2, 2, 4)])
def test_it_is_what_a_checkpoint_would_be(
    models: list[tuple[Path, Path]], tensor: int, pipeline: int, ranks: int
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    assert run_on_ranks(ranks, differences, models, parallel) == [[]] * ranks


def test_what_cannot_be_read_is_said_on_all_ranks(models: list[tuple[Path, Path]], tmp_path: Path) -> None:
    model, checkpoint = models[0]
    with pytest.raises(ConfigError, match="is a folder of this project's checkpoints, not a model in"):
        run_on_ranks(2, differences, [(checkpoint, checkpoint)], ParallelConfig())
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    with pytest.raises(ConfigError, match="model_type is 'mamba'; models of these types can be read: llama"):
        run_on_ranks(2, differences, [(tmp_path, checkpoint)], ParallelConfig())

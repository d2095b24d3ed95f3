"""The published DMC checkpoints, in the layout in which Megatron's older training program saves: small ones,
made here."""

import argparse
import io
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.enums import ModelType
from torch import Tensor

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.megatron_legacy import LegacyCheckpoint
from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.policies.dmc.config import DMCConfig
from lckv.weights.tensors import TensorInfo
from tests.checkpoints_conversion.formats.checkpoints import describe, whole_weights
from tests.megatron_ext.model.stages import MODEL, VOCAB

POLICY = DMCConfig(stage="finetune", target_compression_ratio=4.0, window=12, eps=2.0**-23)
PUBLISHED = replace(
    describe(CompressionConfig(policy=POLICY), init_method_std=0.02),
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)
PADDED = 128
ARGUMENTS: dict[str, Any] = {
    "num_layers": MODEL.num_layers,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 32,
    "padded_vocab_size": PADDED,
    "tokenizer_type": "Llama2Tokenizer",
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "use_rotary_position_embeddings": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "num_experts": None,
    "params_dtype": torch.float32,
    "model_type": ModelType.encoder_or_decoder,
    "data_path": ["1.0", "wiki"],
    "dmc_init_val": 5.0,
    "dmc_window_size": 12,
    "dmc_temp": 0.1,
    "dmc_cr": 4.0,
    "dmc_finetune": True,
    "dmc_is_stage_one": False,
}
LEGACY = (
    ("embedding.", "language_model.embedding."),
    ("output_layer.", "language_model.output_layer."),
    ("decoder.final_layernorm.", "language_model.encoder.final_norm."),
    ("decoder.", "language_model.encoder."),
    (".input_layernorm.", ".input_norm."),
    (".pre_mlp_layernorm.", ".post_attention_norm."),
    ("linear_qkv", "query_key_value"),
    ("linear_proj", "dense"),
    ("linear_fc1", "dense_h_to_4h"),
    ("linear_fc2", "dense_4h_to_h"),
)


def of_rank(name: str, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """What a tensor-parallel rank holds of a whole tensor."""
    if name.startswith(("embedding", "output_layer")):
        return torch.cat((whole, torch.full((PADDED - len(whole), 32), 1e6))).chunk(ranks)[rank]
    if "linear_qkv" in name:
        return whole.chunk(ranks)[rank]
    if "linear_fc1" in name:
        gate, up = whole.chunk(2)
        return torch.cat((gate.chunk(ranks)[rank], up.chunk(ranks)[rank]))
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(ranks, dim=1)[rank]
    return whole


def key_of(name: str, stage: int, layers: int, style: str) -> str:
    """A tensor's key in a file of a pipeline stage, which counts its own layers from 0."""
    if name.startswith("decoder.layers."):
        index = int(name.split(".")[2])
        name = name.replace(f".{index}.", f".{index - stage * layers}.", 1)
    if style == "transformer engine":
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    if style == "legacy":
        for new, old in LEGACY:
            name = name.replace(new, old)
    return name


def stage_of(name: str, stages: int, layers: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) // layers
    return 0 if name.startswith("embedding") else stages - 1


def nested(tensors: dict[str, Any]) -> dict[str, Any]:
    """As models built before Megatron-core have them: dictionaries in dictionaries, the innermost with dotted
    names."""
    found: dict[str, Any] = {"language_model": {"embedding": {"word_embeddings": {}}, "encoder": {}}}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[1] == "embedding":
            found["language_model"]["embedding"]["word_embeddings"]["weight"] = tensor
        elif parts[1] == "output_layer":
            found["language_model"]["output_layer"] = {"weight": tensor}
        else:
            found["language_model"]["encoder"][key.removeprefix("language_model.encoder.")] = tensor
    return found


def publish(
    folder: Path, *, tensor: int = 1, pipeline: int = 1, style: str = "transformer engine", **arguments: Any
) -> Path:
    """Write `whole_weights` as a run with these arguments saves them; ... removes one. Returns the folder of
    the iteration."""
    given = ARGUMENTS | arguments
    given = {name: value for name, value in given.items() if value is not ...}
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    layers = MODEL.num_layers // pipeline
    weights = whole_weights(PUBLISHED)
    iteration = folder / "iter_0002000"
    for rank in range(tensor):
        for stage in range(pipeline):
            model: dict[str, Any] = {
                key_of(name, stage, layers, style): of_rank(name, whole, rank, tensor).clone()
                for name, whole in weights.items()
                if stage_of(name, pipeline, layers) == stage
            }
            if style == "legacy":
                model = nested(model)
            else:
                model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"scaling")
            path = (
                iteration
                / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else ""))
                / "model_optim_rng.pt"
            )
            path.parent.mkdir(parents=True)
            rng = {
                "random": random.getstate(),
                "numpy": np.random.RandomState(1).get_state(),
                "torch": torch.get_rng_state(),
            }
            content = {
                "args": argparse.Namespace(**given, **sizes),
                "checkpoint_version": 3.0,
                "iteration": 2000,
                "model": model,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}},
                "rng_state": [rng],
            }
            torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("2000")
    return iteration


def change(path: Path, action: Callable[[dict[str, Any]], object]) -> None:
    """Change a rank's file."""
    content = torch.load(path / "model_optim_rng.pt", weights_only=False)
    action(content)
    torch.save(content, path / "model_optim_rng.pt")


def load(path: Path, **options: Any) -> LegacyCheckpoint:
    return LegacyCheckpoint(path, **{"vocab_size": VOCAB, **options})


@pytest.mark.parametrize("style", ["transformer engine", "local", "legacy"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_every_layout_and_style(tmp_path, tensor, pipeline, style):
    iteration = publish(tmp_path, tensor=tensor, pipeline=pipeline, style=style)
    checkpoint = load(tmp_path)
    assert checkpoint.path == iteration
    assert checkpoint.iteration == 2000
    assert checkpoint.files == sorted(str(path.relative_to(iteration)) for path in iteration.rglob("*.pt"))
    assert checkpoint.description == PUBLISHED
    weights = whole_weights(PUBLISHED)
    assert checkpoint.infos() == {
        name: TensorInfo(tuple(each.shape), each.dtype) for name, each in weights.items()
    }
    for name, weight in weights.items():
        assert torch.equal(checkpoint.read(name), weight), name
        for rows in (slice(3, 29), slice(0, 1), slice(-5, None)):
            assert torch.equal(checkpoint.read(name, rows), weight[rows]), (name, rows)


def test_bfloat16_and_its_epsilon(tmp_path):
    iteration = publish(tmp_path)
    change(
        iteration / "mp_rank_00",
        lambda content: content["model"].update(
            {name: each.bfloat16() for name, each in content["model"].items() if isinstance(each, Tensor)}
        ),
    )
    description = load(iteration).description
    assert description.dtype == torch.bfloat16
    assert description.compression.policy == replace(POLICY, eps=2.0**-7)


def test_a_tied_model(tmp_path):
    iteration = publish(tmp_path, pipeline=2, untie_embeddings_and_output_weights=False)
    checkpoint = load(
        iteration
    )  # the last stage's copy of the embedding, here its own output layer, is left out
    assert not checkpoint.description.model.untie_embeddings_and_output_weights
    assert "output_layer.weight" not in checkpoint.infos()


STAGES: list[tuple[dict[str, Any], str]] = [
    ({"dmc_is_stage_one": True, "dmc_finetune": False}, "zero_out"),
    ({"dmc_finetune": False}, "retrofit"),
    ({}, "finetune"),
    ({"dmc_finetune": ..., "dmc_is_stage_one": ...}, "finetune"),
]


@pytest.mark.parametrize(("arguments", "stage"), STAGES)
def test_stages(tmp_path, arguments, stage):
    assert load(publish(tmp_path, **arguments)).description.compression.policy == replace(POLICY, stage=stage)


def test_settings_of_merging(tmp_path):
    arguments = {"dmc_init_val": 3, "dmc_window_size": 7, "dmc_temp": 0.2, "dmc_cr": 8}
    policy = load(publish(tmp_path / "a", **arguments)).description.compression.policy
    changed = {"initial_decision_bias": 3.0, "window": 7, "temperature": 0.2, "target_compression_ratio": 8.0}
    assert policy == replace(POLICY, **changed)
    defaults = dict.fromkeys(arguments, ...)
    iteration = publish(tmp_path / "b", **defaults)
    assert load(iteration, given={"dmc_cr": 4}).description.compression.policy == POLICY
    with pytest.raises(ConversionError, match=r"dmc_cr is not there; .*--argument NAME=VALUE"):
        load(iteration)


def test_groups_mean_nothing_without_grouped_query_attention(tmp_path):
    """The program writes num_query_groups 1 for a model whose every head has keys and values of its own."""
    iteration = publish(tmp_path, group_query_attention=False, num_query_groups=1)
    with pytest.raises(ModelError, match=r"linear_qkv.weight \[64, 32\] instead of \[96, 32\]"):
        load(iteration)


def test_vocabulary(tmp_path):
    iteration = publish(tmp_path / "a", vocab_size=VOCAB, tokenizer_type="NullTokenizer")
    checkpoint = LegacyCheckpoint(iteration)
    assert checkpoint.description.vocab_size == VOCAB
    assert checkpoint.description.token_ids == {}
    with pytest.raises(ConversionError, match=r"vocabulary size is 32000, but the embedding has 128 rows"):
        LegacyCheckpoint(publish(tmp_path / "b"))
    with pytest.raises(
        ConversionError,
        match=r"\(HuggingFaceTokenizer\) knows, and of the embedding's 128 rows some are padding",
    ):
        LegacyCheckpoint(publish(tmp_path / "c", tokenizer_type="HuggingFaceTokenizer"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'; it must be 'RMSNorm'"),
    ({"swiglu": ...}, "swiglu is not there; it must be True"),
    ({"rotary_percent": 0.5}, "rotary_percent is 0.5; it must be 1.0"),
    ({"use_rope_scaling": True}, "use_rope_scaling is True; it must be False"),
    ({"num_experts": 8}, "num_experts is 8; it must be None"),
    (
        {"use_rotary_position_embeddings": False, "position_embedding_type": "learned_absolute"},
        "position_embedding_type is 'learned_absolute'; it must be 'rope'",
    ),
    ({"num_layers": "6"}, "num_layers is '6'; it must be an integer"),
    ({"hidden_size": ...}, "hidden_size is not there; it must be an integer"),
    ({"norm_epsilon": -1.0}, "norm_epsilon is -1.0; it must be a number above 0"),
    ({"add_qkv_bias": 1}, "add_qkv_bias is 1; it must be True or False"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_arguments_that_cannot_be_converted(tmp_path, arguments, message):
    with pytest.raises(ConversionError) as raised:
        load(publish(tmp_path, **arguments))
    assert message in str(raised.value)
    assert "model_optim_rng.pt" in str(raised.value)


def test_what_the_unpickler_knows_elsewhere_stays(tmp_path):
    iteration = publish(tmp_path)
    with torch.serialization.safe_globals([io.StringIO]):
        before = set(torch.serialization.get_safe_globals())
        load(iteration)
        assert set(torch.serialization.get_safe_globals()) == before
        change(iteration / "mp_rank_00", lambda content: vars(content["args"]).update(path=io.StringIO("")))
        with pytest.raises(ConversionError, match=r"it names _io.StringIO"):
            load(iteration)
        assert set(torch.serialization.get_safe_globals()) == before


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["args", "model", "optimizer"])
def test_nothing_is_run(tmp_path, place):
    iteration = publish(tmp_path)
    malicious = _Malicious(f"touch {tmp_path}/run")

    def plant(content: dict[str, Any]) -> None:
        target = vars(content["args"]) if place == "args" else content[place]
        target["seed"] = malicious

    change(iteration / "mp_rank_00", plant)
    with pytest.raises(ConversionError, match=r"is refused: it names posix.system, .* Nothing of it was run"):
        load(iteration)
    assert not (tmp_path / "run").exists()


def _cut(content: dict[str, Any]) -> None:
    key = "decoder.layers.2.mlp.linear_fc1.weight"
    content["model"][key] = content["model"][key][:-2].clone()


DAMAGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda content: content["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"),
     r"parts of decoder\.layers\.1\.mlp\.linear_fc2"),
    (_cut, r"parts of decoder\.layers\.2\.mlp.* mp_rank_00 \[64, 32\], mp_rank_01 \[62, 32\]"),
    (lambda content: content.pop("model"), r"has no weights under `model`"),
    (lambda content: content["model"].update(weird=3), r"weird among the weights is a int, not a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("action", "message"), DAMAGES)
def test_ranks_that_do_not_fit_together(tmp_path, action, message):
    iteration = publish(tmp_path, tensor=2)
    change(iteration / "mp_rank_01", action)
    with pytest.raises(ConversionError, match=message):
        load(iteration)


def test_tensors_that_are_not_those_of_the_model(tmp_path):
    iteration = publish(tmp_path)

    def act(content: dict[str, Any]) -> None:
        _cut(content)
        content["model"].pop("decoder.final_layernorm.weight")
        content["model"]["adapter.weight"] = torch.zeros(2)

    change(iteration / "mp_rank_00", act)
    with pytest.raises(ModelError) as raised:
        load(iteration)
    for part in (
        "missing: decoder.final_layernorm",
        "not part of the model: adapter",
        "[126, 32] instead of [128, 32]",
    ):
        assert part in str(raised.value)


def test_two_names_of_one_tensor(tmp_path):
    iteration = publish(tmp_path)
    name = "decoder.layers.0.input_layernorm.weight"
    change(iteration / "mp_rank_00", lambda content: content["model"].update({name: torch.zeros(32)}))
    with pytest.raises(ConversionError, match="is there twice"):
        load(iteration)


def test_ranks_that_are_missing_or_too_many(tmp_path):
    iteration = publish(tmp_path, tensor=2, pipeline=2)
    (iteration / "mp_rank_01_001").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ConversionError, match="files of 1 of 4 ranks are missing: tensor-parallel rank 1 of stage 1"
    ):
        load(iteration)
    (tmp_path / "elsewhere").rename(iteration / "mp_rank_02_000")
    (iteration / "mp_rank_02_000" / "model_optim_rng.pt").rename(tmp_path / "file")
    with pytest.raises(ConversionError, match=r"mp_rank_02_000.* is missing"):
        load(iteration)
    (iteration / "mp_rank_02_000").rename(iteration / "mp_rank_00_000_001")
    with pytest.raises(ConversionError, match="mixtures of experts are not converted"):
        load(iteration)
    (iteration / "mp_rank_00_000_001").rmdir()
    (iteration / "mp_rank_00_000").rename(tmp_path / "first")
    with pytest.raises(ConversionError, match="mp_rank_00 is missing"):
        load(iteration)


def test_a_rank_of_another_layout(tmp_path):
    iteration = publish(tmp_path)
    publish(tmp_path / "other", tensor=2)
    (tmp_path / "other" / "iter_0002000" / "mp_rank_01").rename(iteration / "mp_rank_01")
    with pytest.raises(
        ConversionError, match="mp_rank_01 belongs to no rank of tensor_model_parallel_size 1"
    ):
        load(iteration)


def test_files_that_are_damaged(tmp_path):
    iteration = publish(tmp_path)
    path = iteration / "mp_rank_00" / "model_optim_rng.pt"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"404: not found" * 9):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="cannot be read; it is damaged"):
            load(iteration)
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="cannot be read; it is damaged"):
        load(iteration)
    torch.save([1], path)
    with pytest.raises(ConversionError, match="holds a list, not a checkpoint"):
        load(iteration)


def test_old_versions_and_files_without_arguments(tmp_path):
    iteration = publish(tmp_path)
    change(iteration / "mp_rank_00", lambda content: content.update(checkpoint_version=1.0))
    with pytest.raises(ConversionError, match=r"checkpoint_version is 1.0; it must be 3.0"):
        load(iteration)
    change(iteration / "mp_rank_00", lambda content: content.pop("args"))
    with pytest.raises(ConversionError, match="holds no arguments of a run"):
        load(iteration)


def test_folders(tmp_path):
    publish(tmp_path)
    (tmp_path / "iter_0002000").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert load(tmp_path).path == tmp_path / "release"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    with pytest.raises(ConversionError, match=r"iter_0000100 holds no folders mp_rank_00"):
        load(tmp_path)

"""What `inspect` says of each format."""

import json
from pathlib import Path

import pytest

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.convert import hf_to_megatron
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.opening import format_of
from tests.checkpoints_conversion.formats.test_megatron_legacy import publish
from tests.lckv.families.tiny_models import saved_model
from tests.megatron_ext.model.stages import VOCAB


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved_model(folder / "hf", "qwen2", tie_word_embeddings=True, use_sliding_window=False)
    changes = {"compression.layer_types": "0_2_2", "compression.policy.name": "dmc"}
    hf_to_megatron(str(folder / "hf"), folder / "megatron", changes=changes, proof="never")
    return folder


def inspect(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["inspect", str(path), *options]) == 0
    return capsys.readouterr().out


def test_a_hugging_face_folder(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = inspect(models / "hf", capsys)
    assert said.startswith(f"Hugging Face model: {models / 'hf'}\n")
    for line in (
        "family              qwen2, for Hugging Face Qwen2ForCausalLM",
        "sizes               3 layers, hidden 32, MLP 40, 4 query heads, 2 key/value heads of 8 channels",
        "vocabulary          61 tokens, 61 stored rows, one matrix for embedding and output",
        "positions           up to 64; RoPE base 5000, not scaled",
        "norms               epsilon 1e-05",
        "biases              on queries, keys and values",
        "map                 0_1_2: keys and values computed in 3 of 3 layers",
        "policy              dense: every token is kept",
        "KV cache            192 bytes per token in 16 bits, 1.00x less than a plain model's 192",
        "layer 2  KV  <- own",
    ):
        assert line in said.splitlines(), line
    assert "converted" not in said


def test_a_checkpoint(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = inspect(models / "megatron", capsys)
    assert said.startswith(f"checkpoint of this project: {models / 'megatron' / 'iter_0000000'}\n")
    for line in (
        "family              qwen2, for Hugging Face LCKVLlamaForCausalLM",
        "map                 0_2_2: keys and values computed in 2 of 3 layers",
        "iteration           7 passes without and 2 with gradient",
        "policy              dmc, stage zero_out: target 2 tokens per slot, window 12",
        "KV cache            128 bytes per token in 16 bits, 1.50x less than a plain model's 192",
        "layer 1      <- 2 ↑   ┘",
        "                    keys and values of the map by average",
    ):
        assert line in said.splitlines(), line
    assert f"from Hugging Face model {models / 'hf'}" in said


def test_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(inspect(models / "megatron", capsys, "--json"))
    assert (found["format"], found["family"], found["dtype"]) == ("megatron", "qwen2", "float32")
    assert (found["vocab_size"], found["stored_vocab_size"], found["tied_embeddings"]) == (61, 61, True)
    assert found["compression"]["layer_types"] == "0_2_2"
    assert found["compression"]["policy"]["stage"] == "zero_out"
    assert found["rope"]["base"] == 5000
    assert found["weights_bytes"] == 4 * found["parameters"]
    assert found["conversion"]["initialization"] == "average"
    assert found["training"] is None


def test_a_legacy_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path, tensor=2, vocab_size=VOCAB)
    said = inspect(tmp_path, capsys)
    assert said.startswith(f"checkpoint in Megatron's older layout: {tmp_path / 'iter_0002000'}\n")
    for line in (
        "policy              dmc, stage finetune: target 4 tokens per slot, window 12",
        "                    96 at the 4 tokens per slot that training aims at",
    ):
        assert line in said.splitlines(), line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["config.json"], "huggingface"),
        (["config.json", "manifest.json"], "megatron"),
        (["latest", "iter_0000010/config.json"], "megatron"),
        (["mp_rank_00/model_optim_rng.pt"], "megatron-legacy"),
        (
            ["latest_checkpointed_iteration.txt", "iter_0002000/mp_rank_00/model_optim_rng.pt"],
            "megatron-legacy",
        ),
    ],
)
def test_formats(content: list[str], expected: str, tmp_path: Path) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert format_of(tmp_path) == expected


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"holds no model: neither config\.json"):
        format_of(tmp_path)

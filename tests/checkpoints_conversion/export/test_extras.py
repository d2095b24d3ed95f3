"""The card, the tokenizer, the generation config and the code beside exported weights."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GenerationConfig

from checkpoints_conversion.conversion_record import ConversionRecord, ConversionSource
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.bundle import AUTO_MAP, modelling_files
from checkpoints_conversion.export.extras import export_extras
from checkpoints_conversion.export.model_card import Measured, license_of, model_card
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ModelConfig
from tests.megatron_ext.data.builders import train_sentencepiece

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=320,
    max_position_embeddings=128,
)
MERGING = CompressionConfig(
    layer_types="0_2_2_3", policy=DMCConfig(stage="finetune", target_compression_ratio=4.0)
)
TRAINING = {
    "progress": {"iteration": 1000, "consumed_samples": 8000, "consumed_tokens": 8192000},
    "train": {"global_batch_size": 8, "seq_length": 1024, "precision": "bf16"},
    "optimizer": {
        "lr": 3e-4,
        "min_lr": 3e-5,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 100,
        "weight_decay": 0.1,
    },
}


def describe(compression: CompressionConfig = MERGING) -> ModelDescription:
    return ModelDescription(MODEL, compression, "llama", torch.bfloat16)


def manifest(description: ModelDescription, tokenizer: Path | None = None) -> ConversionRecord:
    """Of a run that began with a plain model from the Hub."""
    first = ConversionRecord(
        description, ConversionSource("huggingface", "someone/plain-model", {}), initialization="average"
    )
    return ConversionRecord(
        description,
        ConversionSource("megatron", "/secret/run", {}),
        tokenizer=str(tokenizer) if tokenizer else None,
        training=TRAINING,
        previous=first,
    )


def folder_with_config(path: Path, model_type: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 320}))
    return path


def test_card_says_what_the_model_is() -> None:
    description = describe()
    card = model_card("tiny", description, manifest(description), measured=Measured(3.5, 2.0), with_code=True)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/plain-model",
    }
    for expected in (
        "# tiny\n",
        "layer 1      <- 2 ↑   ┘",
        "`layer_types`: `0_2_2_3`",
        # 4 layers x (key and value) x 2 heads x 16 channels x 2 bytes
        "| a plain model of these sizes | 512 | 1.00x |",
        "| this sharing map | 384 | 1.33x |",
        "| and the policy dmc, as measured | 110 | 4.67x |",
        "Measured: 3.50 tokens per slot.",
        "Trained for 1,000 iterations, 8,192,000 tokens.",
        "8 sequences of 1,024 tokens per step, bf16.",
        "peak learning rate 0.0003, cosine schedule to 3e-05 with 100 iterations of warm-up",
        "averaged over the layers that read them",
        "Validation loss 2.0000 nats per token, perplexity 7.39.",
        "trust_remote_code=True",
        "import lckv.models",
        "arXiv:2405.10637",
        "arXiv:2410.14442",
        "arXiv:2406.09297",
        "arXiv:2403.09636",
    ):
        assert expected in card, expected
    assert "secret" not in card


def test_card_of_a_plain_model_promises_nothing_special() -> None:
    description = describe(CompressionConfig())
    card = model_card(
        "plain",
        description,
        ConversionRecord(description, ConversionSource("huggingface", "/models/mine", {})),
    )
    assert "trust_remote_code" not in card and "References" not in card and "/models" not in card
    assert "Policy: Every token is kept." in card
    assert "base_model" not in card


def test_parameters_in_the_card_are_those_of_the_model() -> None:
    description = describe()
    count = sum(torch.Size(info.shape).numel() for info in description.expected_tensors().values())
    assert f"{count:,} parameters in bfloat16" in model_card("x", description, manifest(description))


YAML_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
"""Forty lines that stand for 2 ** 40 texts."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", {"license": "apache-2.0"}),
        (f"---\n{YAML_BOMB}license: *a39\n---\n", {}),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", {}),
        ("---\nlicense: other\nlicense_name: llama2\n---\n", {"license": "other", "license_name": "llama2"}),
        ("# only text", {}),
        ("---\n: [broken\n---\n", {}),
        ("---\n- list\n---\n", {}),
    ],
)
def test_license_of_the_source(text: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected
    assert license_of(tmp_path / "elsewhere") == license_of(None) == {}


def test_a_trained_model_gets_everything(tmp_path: Path) -> None:
    folder, vocabulary = (
        folder_with_config(tmp_path / "out", "lckv-llama"),
        train_sentencepiece(tmp_path / "t.model"),
    )
    names = export_extras(folder, describe(), manifest(describe(), vocabulary))
    assert sorted(names) == sorted(
        [
            *modelling_files("dense"),
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "README.md",
        ]
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "config.json"])
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "lckv-llama", "vocab_size": 320, "auto_map": AUTO_MAP}
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert AutoTokenizer.from_pretrained(folder).decode([2]) == "</s>"
    assert "# out\n" in (folder / "README.md").read_text()


def test_a_converted_model_keeps_what_its_source_has(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", folder_with_config(tmp_path / "out", "llama")
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    description = replace(describe(CompressionConfig()), token_ids={"eos_token_id": 7})
    made = ConversionRecord(description, ConversionSource("huggingface", str(source), {}))
    names = export_extras(folder, description, made, name="given", source_folder=source)
    assert sorted(names) == ["README.md", "generation_config.json", "tokenizer.json"]
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6}
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "# given\n" in card
    assert "auto_map" not in (folder / "config.json").read_text()


def test_special_tokens_make_the_generation_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with_config(tmp_path / "out", "llama")
    description = replace(
        describe(CompressionConfig()), token_ids={"bos_token_id": None, "eos_token_id": [2, 5]}
    )
    with caplog.at_level(logging.WARNING):
        export_extras(folder, description, manifest(description))
    assert "No tokenizer is known for this model" in caplog.text
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 5]


def test_a_tokenizer_that_is_gone(tmp_path: Path) -> None:
    folder = folder_with_config(tmp_path / "out", "llama")
    with pytest.raises(
        ConversionError,
        match=r"tokenizer was in .*gone\.model, where there is none now\. Name a copy of it with",
    ):
        export_extras(folder, describe(), manifest(describe(), tmp_path / "gone.model"))

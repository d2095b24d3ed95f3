"""The card, the tokenizer, the generation config and the code beside exported weights."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from checkpoints_conversion.conversion_record import ConversionRecord, ConversionSource
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.extras import export_extras
from checkpoints_conversion.export.measured import Measured, measured_in
from checkpoints_conversion.export.model_card import model_card
from checkpoints_conversion.source_card import card_facts
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.remote_code import AUTO_MAP, modelling_files
from megatron_ext.config import ModelConfig
from megatron_ext.data.order import Source, TrainingOrder
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
TRAINING: dict[str, Any] = {
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
        "Measured on validation text: 3.50 tokens per slot.",
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
        ("---\nbase_model:\n- a/b\nlicense: [mit, gpl]\n---\n", {"base_model": "a/b"}),
        ("---\n: [broken\n---\n", {}),
        ("---\n- list\n---\n", {}),
    ],
)
def test_what_the_page_of_the_source_says(text: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_facts(tmp_path) == expected
    assert card_facts(tmp_path / "elsewhere") == card_facts(None) == {}


def test_the_hub_reads_the_head_of_the_card(tmp_path: Path) -> None:
    origin = tmp_path / "hub" / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "0a1b"
    origin.mkdir(parents=True)
    (origin / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\nlanguage: [en]\n---\n# x\n"
    )
    (origin / "LICENSE.txt").write_text("terms")
    description = describe()
    first = ConversionRecord(
        description, ConversionSource("huggingface", str(origin), {}), card=card_facts(origin)
    )
    made = replace(manifest(description), previous=first)

    def written(name: str, source: Path | None) -> Any:
        folder = folder_with_config(tmp_path / name, "llama")
        export_extras(folder, description, made, source_folder=source)
        return ModelCard.load(folder / "README.md").data, folder

    card, folder = written("with", origin)
    assert (card.license, card.license_name, card.license_link) == ("other", "llama2", "LICENSE.txt")
    assert card.base_model == "meta-llama/Llama-2-7b-hf"
    assert card.library_name == "transformers" and card.pipeline_tag == "text-generation"
    assert (folder / "LICENSE.txt").read_text() == "terms"
    card, _ = written("without", None)  # the origin is gone: the record knows
    assert (card.license, card.license_name, card.license_link) == ("other", "llama2", None)
    assert card.base_model == "meta-llama/Llama-2-7b-hf"


def test_the_base_of_a_local_origin_is_what_its_own_page_says() -> None:
    description = describe()
    first = ConversionRecord(description, ConversionSource("huggingface", "/data/model", {}))
    made = replace(manifest(description), previous=first)
    text = model_card("x", description, made, origin_card={"base_model": "someone/model"})
    assert ModelCard(text).data.base_model == "someone/model" and "From `someone/model`." in text
    assert "base_model" not in model_card("x", description, made)


def trained_on(**progress: Any) -> ConversionRecord:
    training = {**TRAINING, "progress": {**TRAINING["progress"], **progress}}
    return replace(manifest(describe()), training=training)


def test_data_are_named_without_their_places() -> None:
    sources = tuple(
        Source(f"/secret/{name}", name, 1, 1024, 5000, weight)
        for name, weight in (("en_text", 3.0), ("code_text", 1.0))
    )
    left = (Source("/secret/old_text", "old", 1, 1024, 50, 1.0, before=500),)
    order = TrainingOrder(500, sources, left).to_dict()
    card = model_card("x", describe(), trained_on(training_order=order))
    assert "- Data: `en_text`, 5,760,000 tokens (70%)." in card
    assert "- Data: `code_text`, 1,920,000 tokens (23%)." in card
    assert "- Data: `old_text`, 512,000 tokens (6%)." in card
    assert "secret" not in card
    assert "Data:" not in model_card("x", describe(), manifest(describe()))  # of an earlier version


def test_measurements_of_a_checkpoint(tmp_path: Path) -> None:
    """The evaluation of its iteration goes before an older one, and that before training."""
    step = {"iteration": 1000, "loss": 2.1, "compression_ratio": 3.0}
    older = {"iteration": 900, "loss": 2.2, "compression_ratio": 3.5}
    report = {"iteration": 1000, "validation_loss": 2.0, "validation_compression_ratio": 4.0}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(report) + "\n")

    def said(metrics: Path | None, **measured: Any) -> str:
        record = trained_on(measured=measured) if measured else manifest(describe())
        facts = measured_in(record.training, record.previous, metrics)
        assert facts == measured_in(None, record, metrics)  # a model that was converted back and forth
        return model_card("x", describe(), record, measured=facts)

    assert "Measured on validation text: 4.00 tokens per slot." in said(file, training=step, validation=older)
    card = said(None, training=step, validation=older)
    assert "Measured on validation text after 900 iterations: 3.50 tokens per slot." in card
    assert "Validation loss after 900 iterations 2.2000 nats" in card
    assert "and the policy dmc, as measured | 110 |" in card
    assert "Measured in training: 3.00 tokens per slot." in said(None, training=step)
    assert "Measured" not in said(None) and "Measured" not in said(tmp_path / "absent.jsonl")
    averaged = replace(trained_on(measured={"validation": older}), initialization="average")
    assert measured_in(None, averaged, None) is None  # the weights are others since


def test_a_trained_model_gets_everything(tmp_path: Path) -> None:
    folder, vocabulary = (
        folder_with_config(tmp_path / "out", "lckv-llama"),
        train_sentencepiece(tmp_path / "t.model"),
    )
    names = export_extras(folder, describe(), manifest(describe(), vocabulary))
    assert sorted(names) == sorted(
        [
            *modelling_files("dmc"),
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

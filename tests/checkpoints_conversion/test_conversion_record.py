"""conversion.json comes back as it was written; what is damaged is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion.conversion_record import (
    RECORD_NAME,
    ConversionRecord,
    ConversionSource,
    hash_weights,
    package_versions,
    read_record,
    write_record,
)
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ModelConfig, RopeScalingConfig

DESCRIPTION = ModelDescription(
    ModelConfig(
        num_layers=2,
        vocab_size=11,
        max_position_embeddings=8,
        rotary_base=5e5,
        rope_scaling=RopeScalingConfig("llama3", factor=32.0),
        layernorm_epsilon=1e-6,
        untie_embeddings_and_output_weights=False,
    ),
    CompressionConfig("0_0", policy=DMCConfig(stage="finetune", target_compression_ratio=4, eps=1e-3)),
    "qwen2",
    torch.bfloat16,
    {"bos_token_id": None, "eos_token_id": [1, 2], "pad_token_id": 0},
)
FIRST = ConversionRecord(
    DESCRIPTION, ConversionSource("huggingface", "someone/model", {"a": "00"}), "average", tokenizer="there"
)
SECOND = replace(
    FIRST,
    source=ConversionSource("megatron", "runs/1", {}),
    training={"progress": {"iteration": 3}},
    previous=FIRST,
)


@pytest.mark.parametrize("record", [FIRST, SECOND], ids=["first", "second"])
def test_there_and_back(record: ConversionRecord, tmp_path: Path) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_it_says_what_config_fields_cannot() -> None:
    content = json.loads(json.dumps(FIRST.to_json()))
    model, compression = content["description"]["model"], content["description"]["compression"]
    assert model["rotary_base"] == 5e5
    assert model["rope_scaling"]["factor"] == 32
    assert model["layernorm_epsilon"] == 1e-6
    assert model["untie_embeddings_and_output_weights"] is False
    assert model["vocab_size"] == 11
    assert compression["layer_types"] == "0_0"
    assert compression["policy"]["stage"] == "finetune"
    assert content["source"] == {"format": "huggingface", "path": "someone/model", "files": {"a": "00"}}
    assert content["created"].endswith("+00:00")
    assert {"python", "torch", "transformers"} <= content["versions"].keys() == package_versions().keys()


def test_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "nowhere") is None


def test_the_format_of_an_earlier_version_is_kept_as_text(tmp_path: Path) -> None:
    source = {"format": "published-dmc", "path": "x", "files": {}}
    (tmp_path / RECORD_NAME).write_text(_content(source=source))
    record = read_record(tmp_path)
    assert record is not None and record.to_json()["source"] == source


def _content(**changed: Any) -> str:
    return json.dumps({**FIRST.to_json(), **changed})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is no record of a conversion: it holds no mapping"),
        (_content(schema_version=2), "schema_version is 2; this program reads version 1"),
        (_content(source={"path": "x"}), "a field is missing or unknown"),
        (_content(colour="red"), "a field is missing or unknown: .*colour"),
        (_content(description={}), "the description of a model has the fields"),
    ],
)
def test_damage(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(ConversionError, match=f"(?s){RECORD_NAME} .*{said}"):
        read_record(tmp_path)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_weights(tmp_path, ["weights"]) == {"weights": digest}


def test_what_is_published_names_no_place_of_this_machine(tmp_path: Path) -> None:
    first = ConversionRecord(DESCRIPTION, ConversionSource("huggingface", "org/model", {}))
    record = ConversionRecord(
        DESCRIPTION,
        ConversionSource("megatron", str(tmp_path / "run"), {"a.distcp": "0"}),
        tokenizer=str(tmp_path / "tokenizer.model"),
        training={"data": {"data_path": ["0.5", str(tmp_path / "books")]}},
        previous=first,
    )
    cut = record.without_places()
    assert str(tmp_path) not in json.dumps(cut.to_json())
    assert (cut.source.path, cut.tokenizer, cut.previous) == ("run", "tokenizer.model", first)
    assert cut.training == {"data": {"data_path": ["0.5", "books"]}}

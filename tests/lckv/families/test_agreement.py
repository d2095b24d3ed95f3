"""Engine and converter accept and refuse the same configs, and see the same model in them.

Both go over every published config in the tests, and over each of them changed: a field that nobody knows, a
fixed field at another value, fields that are null or written out at their defaults.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion.formats.huggingface import write_safetensors
from checkpoints_conversion.opening import open_huggingface
from lckv.errors import ModelError
from lckv.families import harmless
from lckv.families.decoder import TOKEN_IDS
from lckv.families.registry import FAMILIES, describe, family_of
from lckv.generation.loading import load_model, model_config
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.weights.tensors import MemorySource
from tests.lckv.families.published_configs import CASES

TINY = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": None,
}  # fmt: skip
IDENTITY = ("model_type", "architectures", "dtype")
CHANGES: dict[str, dict[str, Any]] = {
    "as published": {},
    "an unknown field": {"logit_softcapping": 30.0},
    "an unknown field that is null": {"logit_softcapping": None},
    "a fixed field at another value": {"hidden_act": "gelu"},
    "a bias": {"mlp_bias": True},
    "interleaved rotation": {"rope_interleaved": True},
    "quantized": {"quantization_config": {"bits": 4}},
    "code of its own": {"auto_map": {"AutoModel": "x.Y"}},
    "an encoder": {"is_encoder_decoder": True},
    "heads that do not divide": {"num_key_value_heads": 3},
    "another scaling": {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
    "null fields": {
        "attention_dropout": None,
        "initializer_range": None,
        "pad_token_id": None,
        "auto_map": None,
    },
    "a missing size": {"num_hidden_layers": None},
    "another type of number": {"rms_norm_eps": "1e-5"},
    "fields of the base class": {"output_scores": True, "tokenizer_class": "X", "temperature": 0.2},
    "a window in a text": {"sliding_window": "all"},
    "another dtype": {"torch_dtype": "int8"},
}


def _verdict(read: Any) -> tuple[Any, str]:
    """What is read, and the problems."""
    try:
        return read(), ""
    except ModelError as error:
        return None, str(error)


def _folder(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_both_read_the_same(change: str, folders: dict[str, Path]) -> None:
    verdicts = set()
    for name, folder in folders.items():
        _folder(folder, CASES[name] | TINY | CHANGES[change])
        engine, refused = _verdict(partial(model_config, folder))
        converter, refused_too = _verdict(partial(open_huggingface, folder))
        assert refused == refused_too, name
        verdicts.add(not refused)
        if engine is not None:
            decoder = converter.description.decoder()
            assert engine.as_decoder() == replace(decoder, family="lckv-llama", dtype=engine.dtype), name
    accepted = {"as published", "an unknown field that is null", "null fields", "fields of the base class"}
    assert verdicts == {True} if change in accepted else False in verdicts


@pytest.mark.parametrize("name", CASES)
def test_defaults_written_out_change_nothing(name: str) -> None:
    config = CASES[name]
    family = family_of(config["model_type"])
    with_meaning = {*family.fields, *family.compression.names, "rope_parameters", *TOKEN_IDS}
    base = dict.fromkeys(harmless.base_fields() - {*with_meaning, *family.fixed, *IDENTITY}, "anything")
    defaults = harmless.class_defaults(family.stock_type)
    written_out = {field: value for field, value in defaults.items() if field not in with_meaning}
    assert describe(written_out | base | config, {}) == describe(config, {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models of all published configs, their weights random."""
    root = tmp_path_factory.mktemp("models")
    return {name: _save(root / name, config | TINY) for name, config in CASES.items()}


def _save(folder: Path, config: dict[str, Any]) -> Path:
    """A small model with the config's family, its weights random."""
    decoder = describe(config, {})
    infos = family_of(decoder.family).tensors(decoder)
    torch.manual_seed(3)
    weights = {name: torch.randn(info.shape, dtype=torch.float32) / 4 for name, info in infos.items()}
    write_safetensors(_folder(folder, config), MemorySource(weights))
    return folder


def _one_of_each() -> Iterator[str]:
    for family in FAMILIES:
        yield next(name for name, config in CASES.items() if config["model_type"] == family)


@pytest.mark.parametrize("name", list(_one_of_each()))
def test_both_open_a_folder_of_every_family(name: str, tmp_path: Path) -> None:
    config = CASES[name] | TINY
    folder = _save(tmp_path / "model", config)
    model, _ = load_model(folder, device="cpu")
    opened = open_huggingface(folder)
    decoder = opened.description.decoder()
    assert decoder.family == config["model_type"]
    assert model.config.to_dict() == LCKVLlamaConfig.from_decoder(decoder).to_dict() | {
        "_name_or_path": model.config.to_dict().get("_name_or_path")
    }
    assert model.dtype == decoder.dtype == torch.float32
    parameters = dict(model.named_parameters())
    embedding = opened.source.read("embedding.word_embeddings.weight")
    assert torch.equal(parameters["model.embed_tokens.weight"], embedding)
    with torch.inference_mode():
        assert model(torch.arange(6)[None]).logits.isfinite().all()

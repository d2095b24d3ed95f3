"""Reading and writing config.json."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.decoder import Decoder
from lckv.families.lckv_llama import LCKV_LLAMA
from lckv.families.llama import LLAMA
from lckv.families.mistral import MISTRAL
from lckv.families.published_lckv import PUBLISHED_FIELDS
from lckv.families.qwen2 import QWEN2
from lckv.families.registry import FAMILIES, PLAIN_FAMILIES, family_of
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.rope_scaling import Llama3Scaling
from tests.lckv.families.published_configs import (
    LLAMA_2_13B,
    LLAMA_3_1_8B,
    LLAMA_3_2_1B,
    MISTRAL_7B_V0_1,
    PUBLISHED,
    QWEN2_5_0_5B,
    QWEN3_0_6B,
    SMOLLM2_135M,
    TINYLLAMA_LCKV,
)
from tests.lckv.families.tiny_models import CLASSES, EXTRAS, SIZES

LLAMA3_SCALING = Llama3Scaling(32.0, 1.0, 4.0, 8192)


def _read(config: dict[str, Any]) -> Decoder:
    return family_of(config["model_type"]).read_config(config)


def _complaint(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        _read(config)
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_survive_the_way_there_and_back(name: str) -> None:
    config = PUBLISHED[name]
    before = copy.deepcopy(config)
    decoder = _read(config)
    assert config == before
    written = json.loads(json.dumps(family_of(decoder.family).write_config(decoder)))
    assert _read(written) == decoder
    unsaid = {"num_key_value_heads", "head_dim", "torch_dtype", "rope_scaling", "rope_theta"}
    for field in set(config) & set(written) - unsaid - {"max_window_layers", "sliding_window"}:
        assert written[field] == config[field], field


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "tinyllama-lckv"])
def test_transformers_sees_the_same_in_the_written_config(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(family_of(PUBLISHED[name]["model_type"]).write_config(_read(PUBLISHED[name])))
    )
    ours = AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = AutoConfig.for_model(**copy.deepcopy(PUBLISHED[name])).to_dict()
    uninteresting = {"_name_or_path", "transformers_version", "max_window_layers", *(set(theirs) - set(ours))}
    if name.startswith("Qwen2"):
        ours.pop("head_dim")  # no field of its class; its model reads it all the same
    assert {k: v for k, v in ours.items() if k not in uninteresting} == {
        k: v for k, v in theirs.items() if k not in uninteresting
    }
    assert set(theirs) - set(ours) <= {"is_llama_config", "rope_interleaved", "use_mrope"}


def test_values_land_in_their_fields() -> None:
    llama = _read(LLAMA_3_2_1B)
    assert (llama.num_hidden_layers, llama.hidden_size, llama.intermediate_size) == (16, 2048, 8192)
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim) == (32, 8, 64)
    assert (llama.rms_norm_eps, llama.rope_base, llama.rope_scaling) == (1e-5, 500000.0, LLAMA3_SCALING)
    assert llama.tie_word_embeddings
    assert (llama.vocab_size, llama.max_position_embeddings) == (128256, 131072)
    smol = _read(SMOLLM2_135M)
    assert (smol.initializer_range, smol.rope_base) == (0.041666666666666664, 100000.0)
    assert smol.dtype == torch.bfloat16
    assert smol.token_ids == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    assert _read(QWEN2_5_0_5B).qkv_bias
    assert _read(QWEN3_0_6B).qk_norm
    assert _read(QWEN3_0_6B).head_dim == 128
    assert _read(LLAMA_2_13B).num_key_value_heads == 40
    assert not _read(LLAMA_2_13B).tie_word_embeddings
    mistral = _read(MISTRAL_7B_V0_1)
    assert mistral.compression.layer_types == "_".join(f"{i}s" for i in range(32))
    assert mistral.compression.sliding_window == 4096
    lckv = _read(TINYLLAMA_LCKV).compression
    assert lckv == CompressionConfig(layer_types=TINYLLAMA_LCKV["layer_types"])


@pytest.mark.parametrize("family", CLASSES)
def test_configs_of_transformers_classes_are_read(family: str, tmp_path: Path) -> None:
    tokens = {"pad_token_id": 7, "eos_token_id": [2, 3]}
    theirs = CLASSES[family][0](**(SIZES | EXTRAS[family] | tokens), initializer_range=0.3)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    decoder = FAMILIES[family].read_config(theirs.to_dict())
    assert FAMILIES[family].read_config(saved) == decoder
    assert decoder.token_ids["eos_token_id"] == [2, 3]
    assert decoder.token_ids["pad_token_id"] == 7
    assert decoder.initializer_range == 0.3
    again = CLASSES[family][0].from_dict(FAMILIES[family].write_config(decoder)).to_dict()
    kept = set(saved) - {"transformers_version", "max_window_layers"}
    assert {name: again[name] for name in kept} == {name: saved[name] for name in kept}


@pytest.mark.parametrize("config", [LLAMA_3_1_8B, LLAMA_2_13B, QWEN3_0_6B, MISTRAL_7B_V0_1, TINYLLAMA_LCKV])
def test_both_spellings_of_transformers_mean_the_same(config: dict[str, Any]) -> None:
    new = {
        name: value
        for name, value in config.items()
        if name not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    new["rope_parameters"] = scaling | {"rope_theta": config.get("rope_theta", 10000.0)}
    new["dtype"] = config["torch_dtype"]
    assert _read(new) == _read(config)
    older = config | {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in scaling.items()}}
    assert _read(older) == _read(config)


def test_software_that_knows_only_transformers_4_finds_base_and_scaling() -> None:
    written = LLAMA.write_config(_read(LLAMA_3_1_8B))
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == LLAMA_3_1_8B["rope_scaling"]
    assert LLAMA.write_config(_read(LLAMA_2_13B))["rope_scaling"] is None
    assert LlamaConfig.from_dict(written).rope_parameters == LLAMA_3_1_8B["rope_scaling"] | {
        "rope_theta": 500000.0
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0; this field of a llama model is unknown here"),
        ({"mlp_bias": True}, "mlp_bias is True; it must be False: the MLP here has no bias"),
        (
            {"attention_bias": True},
            "attention_bias is True; it must be False: true adds a bias to the output projection",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}; it must be left out: quantized weights",
        ),
        (
            {"auto_map": {"AutoModel": "x.Y"}},
            "auto_map is {'AutoModel': 'x.Y'}; it must be left out: the model brings its own",
        ),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "it must be that of a language model, LlamaForCausalLM",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; it must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id is '</s>'; it must be null, the number of a token, or a list",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 40; it must be a multiple of num_key_value_heads, which is 3",
        ),
        ({"torch_dtype": "int8"}, "dtype is 'int8'; weights of float32, bfloat16, float16 can be read"),
        ({"sliding_window": 5}, "sliding_window is 5; this field of a llama model is unknown here"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; it must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only whole heads"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0; it must be null or a mapping"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
            "rope_type is 'proportional'; it must be one of default, linear, llama3, dynamic, yarn, longrope",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling.factor is None; rope_type linear needs a number",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "original_max_position_embeddings is None; rope_type llama3 needs",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "rope_scaling.beta_fast is 32; with rope_type linear",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
            "rope_scaling.type is 'linear' and rope_scaling.rope_type is",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}},
            "rope_theta is 10000.0 and 100000.0 in two places",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters is {'rope_type': 'default'} and rope_scaling is",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(change: dict[str, Any], message: str) -> None:
    assert message in _complaint(LLAMA_2_13B | change)


def test_all_problems_are_told_at_once() -> None:
    lines = _complaint(LLAMA_2_13B | {"mlp_bias": True, "hidden_act": "relu", "strange": 1}).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "config.json: hidden_act",
        "config.json: mlp_bias",
        "config.json: strange",
    ]


def test_fields_that_do_not_matter_are_passed_over() -> None:
    harmless = {
        "pretraining_tp": 2,
        "use_cache": False,
        "id2label": {"0": "x"},
        "mlp_bias": None,
        "hidden_act": "swish",
    }
    assert _read(LLAMA_2_13B | harmless) == _read(LLAMA_2_13B)


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    optional = (
        "num_key_value_heads",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "torch_dtype",
        "initializer_range",
    )
    bare = {name: value for name, value in LLAMA_2_13B.items() if name not in optional}
    decoder = _read(bare)
    assert decoder == replace(_read(LLAMA_2_13B), dtype=torch.float32)
    assert _read(bare | {"eos_token_id": None}).token_ids["eos_token_id"] is None
    for family in PLAIN_FAMILIES:
        theirs = CLASSES[family.name][0]()
        assert family.token_ids == {name: getattr(theirs, name) for name in family.token_ids}
        for name, field in family.fields.items():
            if isinstance(field.default, bool | int | float):
                assert getattr(theirs, name) == field.default, name


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_only_llama_may_leave_out_the_number_of_key_value_heads(family: str) -> None:
    config = next(config for config in PUBLISHED.values() if config["model_type"] == family)
    assert "num_key_value_heads is missing" in _complaint(
        {name: value for name, value in config.items() if name != "num_key_value_heads"}
    )


def test_the_dtype_of_the_weights_wins() -> None:
    assert LLAMA.read_config(LLAMA_2_13B, torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "layer_types", "window"),
    [
        ({}, None, None),
        ({"use_sliding_window": True, "sliding_window": None}, None, None),
        ({"use_sliding_window": True, "sliding_window": 9}, "0_1_2s_3s", 9),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, "0s_1s_2s_3s", 9),
        ({"use_sliding_window": True, "max_window_layers": 3}, "0_1_2_3s", 4096),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", *["full_attention"] * 3],
            },
            "0s_1_2_3",
            9,
        ),
        ({"sliding_window": 9, "layer_types": ["full_attention"] * 4}, None, None),
    ],
)
def test_windows_of_qwen_become_maps(
    change: dict[str, Any], layer_types: str | None, window: int | None
) -> None:
    base = {name: value for name, value in QWEN2_5_0_5B.items() if name != "sliding_window"}
    config = base | {"num_hidden_layers": 4, "max_window_layers": 2} | change
    decoder = _read(config)
    assert decoder.compression == CompressionConfig(layer_types=layer_types, sliding_window=window)
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    kinds = [
        "sliding_attention" if layer.sliding else "full_attention" for layer in decoder.compression.map(4)
    ]
    assert theirs.layer_types == kinds
    again = AutoConfig.for_model(**QWEN2.write_config(decoder))
    assert (again.layer_types, again.sliding_window) == (kinds, window)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": ["full_attention"]},
            "it must be null or 24 times one of full_attention, sliding_attention",
        ),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types is ['chunked_attention'"),
        (
            {"layer_types": ["sliding_attention"] * 24},
            "use_sliding_window is False and sliding_window is 32768, but some layers",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0},
            "sliding_window is 0, but some layers",
        ),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; it must be true or false"),
        ({"max_window_layers": "all"}, "max_window_layers is 'all'; it must be an integer"),
        ({"use_mrope": True}, "use_mrope is True"),
    ],
)
def test_windows_of_qwen_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    assert message in _complaint(QWEN2_5_0_5B | change)


def test_windows_of_mistral() -> None:
    without = {name: value for name, value in MISTRAL_7B_V0_1.items() if name != "sliding_window"}
    assert _read(without) == _read(MISTRAL_7B_V0_1)  # transformers' default is the same
    assert MISTRAL.write_config(_read(MISTRAL_7B_V0_1))["sliding_window"] == 4096
    assert MISTRAL.write_config(_read(MISTRAL_7B_V0_1 | {"sliding_window": None}))["sliding_window"] is None
    assert "sliding_window is 0; it must be null or a number of tokens" in _complaint(
        MISTRAL_7B_V0_1 | {"sliding_window": 0}
    )
    assert "layer_types is" in _complaint(MISTRAL_7B_V0_1 | {"layer_types": ["full_attention"] * 32})


def test_published_lckv_windows() -> None:
    assert _read(TINYLLAMA_LCKV).compression.sliding_window is None  # in every config, needed or not
    sliding = TINYLLAMA_LCKV | {"num_hidden_layers": 3, "layer_types": "0s_0s_2"}
    assert _read(sliding).compression.sliding_window == 4096
    assert _read({name: value for name, value in sliding.items() if name != "sliding_window"}) == _read(
        sliding
    )
    settings = {"force_nodiag": True, "forward_passes": 3, "backward_passes": 1}
    assert _read(sliding | settings).compression == CompressionConfig("0s_0s_2", 3, 1, 4096, True)
    assert _read(sliding | {"layer_types": None}).compression == CompressionConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": "0_1"}, "config.json: compression.layer_types is '0_1'; it has 2 entries"),
        ({"layer_types": ["full_attention"] * 22}, "config.json: layer_types is ['full_attention'"),
        ({"backward_passes": 0}, "compression.backward_passes is 0; it must be at least 1"),
        (dict.fromkeys(PUBLISHED_FIELDS) | {"compression": {"windows": 3}}, "compression.windows is unknown"),
        (
            {"compression": {}},
            (
                "layer_types, forward_passes, backward_passes, sliding_window, force_nodiag are given beside "
                "compression"
            ),
        ),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"qkv_bias": "some"}, "qkv_bias is 'some'; it must be true or false"),
    ],
)
def test_lckv_configs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    assert message in _complaint(TINYLLAMA_LCKV | change)


EVERYTHING = Decoder(
    num_hidden_layers=4,
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=101,
    max_position_embeddings=512,
    rope_base=12345.0,
    rope_scaling=LLAMA3_SCALING,
    rms_norm_eps=3e-6,
    tie_word_embeddings=True,
    qkv_bias=True,
    qk_norm=True,
    initializer_range=0.03,
    compression=CompressionConfig(
        "0_3_3_3", 3, 1, None, True, DMCConfig(stage="finetune", window=None, eps=1e-4)
    ),
    dtype=torch.bfloat16,
    token_ids={"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6},
)


def test_lckv_config_carries_everything(tmp_path: Path) -> None:
    written = json.loads(json.dumps(LCKV_LLAMA.write_config(EVERYTHING)))
    assert _read(written) == EVERYTHING
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = LCKVLlamaConfig.from_pretrained(tmp_path)
    assert theirs.compression_config() == EVERYTHING.compression
    assert (theirs.qkv_bias, theirs.qk_norm, theirs.head_dim, theirs.rms_norm_eps) == (True, True, 8, 3e-6)
    assert theirs.rope_parameters["rope_theta"] == 12345.0
    assert theirs.rope_parameters["factor"] == 32.0
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (3, [4, 5], 6)
    theirs.save_pretrained(tmp_path)
    assert _read(json.loads((tmp_path / "config.json").read_text())) == EVERYTHING


def test_dropout_of_attention_is_carried() -> None:
    decoder = replace(EVERYTHING, attention_dropout=0.1, compression=CompressionConfig("0_0_2_2"))
    assert _read(LCKV_LLAMA.write_config(decoder)) == decoder


@pytest.mark.parametrize(
    ("family", "model", "compression", "message"),
    [
        (
            "llama",
            {"qkv_bias": True},
            {},
            "qkv_bias is True, which is False in every model of the family",
        ),
        ("qwen2", {"qkv_bias": False}, {}, "qkv_bias is False"),
        ("qwen3", {"qk_norm": False}, {}, "qk_norm is False"),
        ("llama", {"hidden_size": 50}, {}, "num_attention_heads 6 does not divide hidden_size 50"),
        (
            "llama",
            {},
            {"layer_types": "0_0_2_2"},
            "compression.layer_types is 0_0_2_2: layers read the keys and values of others",
        ),
        (
            "llama",
            {},
            {"layer_types": "0s_1s_2s_3s", "sliding_window": 4},
            "0s_1s_2s_3s: layers have a window",
        ),
        (
            "mistral",
            {},
            {"layer_types": "0s_1_2s_3s", "sliding_window": 4},
            "some layers have a window and some have none",
        ),
        ("qwen2", {"qkv_bias": True}, {"force_nodiag": True}, "compression.force_nodiag is true"),
        ("llama", {}, {"policy": DMCConfig()}, "compression.policy.name is dmc: not every token is kept"),
    ],
)
def test_what_a_family_cannot_express(
    family: str, model: dict[str, Any], compression: dict[str, Any], message: str
) -> None:
    plain = {"qkv_bias": False, "qk_norm": family == "qwen3"}
    decoder = replace(EVERYTHING, **(plain | model), compression=CompressionConfig(**compression))
    with pytest.raises(ModelError, match=r"ForCausalLM cannot express it") as caught:
        FAMILIES[family].write_config(decoder)
    assert message in str(caught.value)

"""Scaled rotary embeddings in configs: published, both spellings, there and back, and what is refused."""

import json
from copy import deepcopy
from typing import Any

import pytest

from lckv.errors import ModelError
from lckv.families.registry import FAMILIES, family_of
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.rope_scaling import DynamicScaling, LongRopeScaling, YarnScaling, attention_factor
from tests.lckv.families.tiny_models import CLASSES, SIZES
from tests.lckv.rope_parameters import DEEPSEEK, QWEN_128K, longrope

SCALINGS = {
    "Qwen 128k": QWEN_128K,
    "DeepSeek": DEEPSEEK,
    "every field of yarn": DEEPSEEK | {"attention_factor": 1.5, "truncate": False},
    "longrope": longrope(8, 16),
    "longrope, every field": longrope(8, 16, factor=3.0, attention_factor=1.25),
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def config(family: str = "llama", **fields: Any) -> dict[str, Any]:
    """Of transformers 4."""
    sizes = {name: value for name, value in SIZES.items() if name != "rope_parameters"}
    return sizes | {"model_type": family, "head_dim": 8, "rope_theta": 5e4} | fields


def scaling(given: dict[str, Any]) -> Any:
    return family_of(given["model_type"]).read_config(given).rope_scaling


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("name", SCALINGS)
def test_there_and_back_in_both_spellings(name: str, family: str) -> None:
    parameters = SCALINGS[name]
    old = {"type" if key == "rope_type" else key: value for key, value in parameters.items()}
    decoder = family_of(family).read_config(config(family, rope_scaling=old))
    new = config(family, rope_parameters={"rope_theta": 5e4, **parameters})
    del new["rope_theta"]
    assert family_of(family).read_config(new) == decoder

    for writer in (family, "lckv-llama"):
        written = json.loads(json.dumps(FAMILIES[writer].write_config(decoder)))
        assert written["rope_parameters"] == {"rope_theta": 5e4, **parameters}
        assert written.get("rope_scaling", parameters) == parameters
        assert FAMILIES[writer].read_config(written).rope_scaling == decoder.rope_scaling
        reader = CLASSES[family][0] if writer == family else LCKVLlamaConfig
        assert reader.from_dict(written).rope_parameters == {"rope_theta": 5e4, **parameters}


def test_software_that_knows_only_transformers_4_finds_the_original_context() -> None:
    decoder = FAMILIES["llama"].read_config(config(rope_scaling=longrope(8, 16)))
    assert FAMILIES["llama"].write_config(decoder)["original_max_position_embeddings"] == 16


@pytest.mark.parametrize("parameters", [QWEN_128K, longrope(8, 32768)], ids=["yarn", "longrope"])
def test_the_original_context_stands_inside_or_beside_or_is_the_whole(parameters: dict[str, Any]) -> None:
    name = "original_max_position_embeddings"
    bare = {key: value for key, value in parameters.items() if key != name}
    inside = scaling(config(rope_scaling=parameters))
    beside = config(rope_scaling=bare) | {name: 32768}
    assert scaling(beside) == scaling(beside | {"rope_scaling": parameters}) == inside
    assert scaling(config(rope_scaling=bare)).original_max_position_embeddings == 64

    sizes = {key: value for key, value in SIZES.items() if key != "rope_parameters"}
    for spelling in ("rope_scaling", "rope_parameters"):
        given: dict[str, Any] = {**sizes, spelling: {"rope_theta": 1e4, **bare}, name: 32768}
        assert LCKVLlamaConfig(**given).rope_scaling_config() == inside


def test_published_attention_factors() -> None:
    yarn = scaling(config(rope_scaling=QWEN_128K))
    assert yarn == YarnScaling(4.0, 32768)
    assert attention_factor(yarn, 131072) == pytest.approx(1.1386, abs=1e-4)
    deepseek = DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.707}
    assert attention_factor(scaling(config(rope_scaling=deepseek)), 163840) == 1
    phi = scaling(config(rope_scaling=longrope(8, 4096), max_position_embeddings=131072))
    assert isinstance(phi, LongRopeScaling)
    assert attention_factor(phi, 131072) == pytest.approx(1.1902, abs=1e-4)  # of Phi-3 with 128k tokens
    assert attention_factor(DynamicScaling(2.0), 64) == 1


LISTS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "yarn"}, "rope_scaling.factor is None; rope_type yarn needs a number"),
        ({**QWEN_128K, "factor": 0.5}, "rope_scaling.factor is 0.5; it must be a number of at least 1"),
        ({**QWEN_128K, "factor": True}, "rope_scaling.factor is True; rope_type yarn needs a number"),
        (
            {**QWEN_128K, "original_max_position_embeddings": 1.5},
            "original_max_position_embeddings is 1.5; rope_type yarn needs an integer",
        ),
        (
            {**QWEN_128K, "original_max_position_embeddings": 0},
            "rope_scaling.original_max_position_embeddings is 0; it must be a number greater than 0",
        ),
        (
            {**QWEN_128K, "attention_factor": 0},
            "rope_scaling.attention_factor is 0.0; it must be a number greater than 0, or left out",
        ),
        ({**QWEN_128K, "truncate": 1}, "truncate is 1; rope_type yarn needs true or false or null"),
        (
            {**QWEN_128K, "beta_slow": -1},
            "rope_scaling.beta_slow is -1.0; it must be a number greater than 0",
        ),
        ({**QWEN_128K, "beta_fast": 1, "beta_slow": 2}, "beta_fast is 1.0; it must be at least beta_slow"),
        ({**QWEN_128K, "mscale": -1}, "rope_scaling.mscale is -1.0; it must be a number of at least 0"),
        ({**QWEN_128K, "finetuned": True}, "finetuned is True; with rope_type yarn this field has no known"),
        ({"rope_type": "longrope"}, "short_factor is None; rope_type longrope needs a list of numbers"),
        (
            {"rope_type": "longrope", **LISTS, "long_factor": [1.0] * 3},
            "long_factor is a list of 3 numbers; it must have one for each pair of a head's channels, 4",
        ),
        (
            {"rope_type": "longrope", **LISTS, "long_factor": [1.0, 1.0, "x", 1.0]},
            "rope_type longrope needs a list of numbers",
        ),
        (
            {"rope_type": "longrope", **LISTS, "short_factor": [1.0, 0.0, 1.0, 1.0]},
            "short_factor is a list with 0.0; all must be numbers greater than 0",
        ),
        (
            {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1; it must be at least 2",
        ),
        ({"rope_type": "dynamic"}, "rope_scaling.factor is None; rope_type dynamic needs a number"),
        (
            {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0},
            "alpha is 1000.0; with rope_type dynamic this field has no known meaning",
        ),
        ({"rope_type": ["yarn"]}, "rope_scaling.rope_type is ['yarn']; it must be one of default, linear"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        scaling(config(rope_scaling=fields))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": QWEN_128K, "original_max_position_embeddings": 16},
            "is 16 and rope_scaling.original_max_position_embeddings is 32768; they must be equal",
        ),
        (
            {"original_max_position_embeddings": 16},
            "original_max_position_embeddings is 16; with rope_type default this field has no known meaning",
        ),
        (
            {"rope_scaling": QWEN_128K, "rope_theta": 1.0},
            "type is yarn; it needs a base (rope_theta) above 1",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2},
            "type is dynamic; it needs heads of more than 2 channels",
        ),
        (
            {"rope_scaling": QWEN_128K, "rope_parameters": QWEN_128K | {"beta_fast": 16}},
            "they differ",
        ),
    ],
)
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        scaling(config(**fields))
    assert message in str(caught.value)
    if "rope_parameters" not in fields:
        sizes = {key: value for key, value in SIZES.items() if key != "rope_parameters"}
        with pytest.raises(ModelError) as caught:
            LCKVLlamaConfig(**{**sizes, "head_dim": 8, **deepcopy(fields)})  # transformers changes them
        assert message.replace("rope_scaling.", "rope_parameters.") in str(caught.value)

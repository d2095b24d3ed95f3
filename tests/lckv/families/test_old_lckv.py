"""opt-llama and cla-llama: from their own words to maps, and what is refused."""

import json
import subprocess
import sys
from typing import Any

import pytest

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.old_lckv import CLA_LLAMA, OPT_LLAMA
from tests.lckv.families.published_configs import CASES

OPT = CASES["opt_llama_22"] | {"num_hidden_layers": 5, "layer_types": "0_1_1_2_0", "target_layer": -2}
CLA = CASES["cla_llama_10"] | {"num_hidden_layers": 5, "layer_types": "0_2_1_1_2"}


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "layer_types", "passes"),
    [
        (OPT, "0_3_3_3_4", (7, 2)),
        (OPT | {"num_encoders": 3, "num_trained_encoders": 0}, "0_3_3_3_4", (3, 1)),
        (_without(OPT, "num_encoders", "num_trained_encoders"), "0_3_3_3_4", (7, 2)),
        (OPT | {"target_layer": 3}, "0_3_3_3_4", (7, 2)),
        (OPT | {"layer_types": "1_1_0_2_1"}, "3_3_2_3_3", (7, 2)),
        (OPT | {"layer_types": "0_1_1_0_1"}, "0_3_3_3_3", (7, 2)),  # the target may be of kind 0 too
        (_without(OPT, "layer_types", "target_layer") | {"num_warmup_layers": 2}, "0_1_4_4_4", (7, 2)),
        (_without(OPT, "layer_types", "target_layer"), "0_1_2_3_4", (7, 2)),
    ],
)
def test_opt_llama(config: dict[str, Any], layer_types: str, passes: tuple[int, int]) -> None:
    """No layer of the published code sees the query's own position."""
    expected = CompressionConfig(layer_types, *passes, force_nodiag=True)
    assert OPT_LLAMA.read_config(config).compression == expected


@pytest.mark.parametrize(
    ("layer_types", "expected"),
    [("0_2_1_1_2", "0_1_1_1_4"), ("2_1_0_1_1", "0_0_2_2_2"), ("0_0_0_0_0", "0_1_2_3_4")],
)
def test_cla_llama(layer_types: str, expected: str) -> None:
    compression = CLA_LLAMA.read_config(CLA | {"layer_types": layer_types}).compression
    assert compression == CompressionConfig(expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OPT | {"train_kv": True}, "train_kv is True; it must be False: true trained the model with a loss"),
        (OPT | {"layer_types": "0_1_2_0"}, "layer_types is '0_1_2_0'; it must be null or 5 times 0, 1 or 2"),
        (OPT | {"layer_types": "0_1_1_3_0"}, "5 times 0, 1 or 2 joined by '_'"),
        (OPT | {"layer_types": [0, 1, 1, 2, 0]}, "5 times 0, 1 or 2 joined by '_'"),
        (
            OPT | {"layer_types": "0_2_1_2_0"},
            "layer_types has a 2 for layer 1; only target_layer, 3, can",
        ),
        (OPT | {"layer_types": "0_1_1_1_0"}, "target_layer is 3, which is 1 in layer_types"),
        (OPT | {"target_layer": 5}, "target_layer is 5; there are 5 layers"),
        (OPT | {"target_layer": "last"}, "target_layer is 'last'; it must be an integer."),
        (OPT | {"num_encoders": -1}, "num_encoders is -1; it must be an integer of at least 0"),
        (OPT | {"num_trained_encoders": 9}, "num_trained_encoders is 9; it must be at most num_encoders, 8"),
        (OPT | {"num_warmup_layers": 2}, "num_warmup_layers is given beside layer_types or target_layer"),
        (
            _without(OPT, "layer_types", "target_layer") | {"num_warmup_layers": 5},
            "num_warmup_layers is 5; it must be less than num_hidden_layers, 5",
        ),
        (OPT | {"train_last_encoder": "none"}, "train_last_encoder is 'none'; this field of a opt-llama"),
    ],
)
def test_opt_llama_that_makes_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        OPT_LLAMA.read_config(config)
    assert message in str(caught.value)


def test_cla_llama_that_makes_no_sense() -> None:
    with pytest.raises(ModelError, match="layer_types begins with 1; there is no layer below"):
        CLA_LLAMA.read_config(CLA | {"layer_types": "1_2_1_1_2"})


@pytest.mark.parametrize(("family", "config"), [(OPT_LLAMA, OPT), (CLA_LLAMA, CLA)])
def test_they_are_only_read(family: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"models of the family {family.name} are only read"):
        family.write_config(family.read_config(config))


def test_reading_needs_transformers_only_for_fields_that_no_family_declares() -> None:
    code = (
        "import json, sys\n"
        "from lckv.families.registry import describe\n"
        "import lckv.weights.huggingface\n"
        "describe(json.loads(sys.argv[1]), {})\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(OPT)], check=True, timeout=60)

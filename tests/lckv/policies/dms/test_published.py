"""Published models: a plain model's folder with fields of the policy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lckv.errors import ModelError
from lckv.families.registry import describe, export_family
from lckv.generation.loading import load_model
from lckv.policies.dms.config import DMSConfig

FOLDER = Path(__file__).parents[3] / "golden" / "dms"
GOLDEN = FOLDER / "e_model_qneuron.safetensors"
PUBLISHED = {"dms_cr": 8, "dms_window_size": 512, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0}


def plain(**fields: Any) -> dict[str, Any]:
    with safe_open(GOLDEN, "pt") as file:
        written = json.loads(file.metadata()["json"])["config"]
    config = {name: value for name, value in written.items() if not name.startswith("dms_")}
    return config | {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 64} | fields


def policy_of(config: dict[str, Any]) -> object:
    return describe(config, {}).compression.policy


@pytest.mark.parametrize("name", ["qneuron", "adapter"])
def test_a_recorded_model_is_read_and_says_what_it_said(tmp_path: Path, name: str) -> None:
    golden = FOLDER / f"e_model_{name}.safetensors"
    tensors = load_file(golden)
    with safe_open(golden, "pt") as file:
        config = json.loads(file.metadata()["json"])["config"]
    config = plain() | config | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
    save_file(state, tmp_path / "model.safetensors")
    model, _ = load_model(str(tmp_path), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits = model(tensors["input_ids"].long(), use_cache=False).logits
    torch.testing.assert_close(logits, tensors["eval_prefill_logits"], rtol=0, atol=3e-5)


def test_fields_of_the_published_model() -> None:
    expected = DMSConfig(stage="finetune", target_compression_ratio=8, window=512)
    assert policy_of(plain(**PUBLISHED)) == expected
    assert policy_of(plain(dms_cr=4, dms_tau=0.5)) == DMSConfig(
        stage="finetune", target_compression_ratio=4, window=512, temperature=0.5
    )
    assert policy_of(plain(dms_separate_alpha=True, dms_alpha_per="layer")) == replace(
        expected, decision_source="adapter", decisions_per="layer"
    )
    assert policy_of(plain()) != expected
    assert policy_of(plain(**(PUBLISHED | dict.fromkeys(("dms_window_size", "dms_alpha_per"))))) == expected
    decoder = describe(plain(**PUBLISHED, dms_preallocate_for_tokens=4096, dms_alpha_per="head"), {})
    assert decoder.compression.policy == expected
    family = export_family(decoder)
    assert family.name == "lckv-llama"
    assert family.read_config(family.write_config(decoder)).compression.policy == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dms_separate_alpha": 1}, "dms_separate_alpha is 1; it must be False or True"),
        ({"dms_alpha_per": "row"}, "dms_alpha_per is 'row'; it must be 'head' or 'layer'"),
        ({"dms_disable_eviction": True}, "dms_disable_eviction is True; it must be False"),
        ({"dms_cr": "8"}, "dms_cr is '8'; it must be a number above 0"),
        ({"dms_window_size": 0}, "dms_window_size is 0; it must be a number of tokens, at least 1"),
        ({"dms_alpha_scale": -1}, "dms_alpha_scale is -1; it must be a number above 0"),
        ({"dms_cr": 8, "dms_unheard": 1}, "dms_unheard is 1; this field of a qwen3 model is unknown here"),
        ({"auto_map": {"AutoModel": "a.B"}}, "auto_map is .* the model brings its own code"),
    ],
)
def test_what_cannot_be_computed_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {said}"):
        policy_of(plain(**fields))


def test_fields_of_two_policies() -> None:
    decoder = describe(plain(), {})
    merging = {"layer_types": "0_1", "policy": {"name": "dmc"}}
    config = export_family(decoder).write_config(decoder)
    config |= {"model_type": "lckv-llama", "architectures": ["LCKVLlamaForCausalLM"], "qk_norm": True}
    for name in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        config.pop(name)
    both = config | {"compression": merging, "dms_cr": 8}
    with pytest.raises(
        ModelError, match=r"compression\.policy\.name is dmc, and dms_cr are fields of dms; remove"
    ):
        describe(both, {})
    deciding = describe(plain(dms_cr=4, dms_window_size=7), {})
    once = export_family(deciding).write_config(deciding)
    assert describe(once | {"dms_cr": 4, "dms_window_size": 7}, {}).compression.policy.window == 7
    with pytest.raises(ModelError, match=r"compression\.policy\.name is dms, and dms_cr are fields of dms"):
        describe(once | {"dms_cr": 8}, {})

"""save_pretrained and from_pretrained, through the Auto classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lckv.models import configuration_lckv_llama
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM, LCKVLlamaModel
from lckv.remote_code import AUTO_MAP, modelling_files
from tests.lckv.models.tiny import CYCLIC, CYCLIC_WINDOWS, MERGING, SHARED, close, config, model, tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip(tmp_path: Path, sharded: bool, tied: bool) -> None:
    one = model(CYCLIC, MERGING, tie_word_embeddings=tied, qkv_bias=True, qk_norm=True)
    one.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 if sharded else [file.name for file in files] == ["model.safetensors"]
    stored = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118 it is not iterable
    assert ("lm_head.weight" in stored) != tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LCKVLlamaForCausalLM)
    assert not again.training
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    state, same = one.state_dict(), again.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())
    assert again.config.compression == one.config.compression
    ids = tokens(1, 6)
    assert torch.equal(again(ids).logits, one(ids).logits)
    again.save_pretrained(tmp_path / "again")
    if not sharded:
        assert (tmp_path / "again" / files[0].name).read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize("layer_types", [None, SHARED, CYCLIC_WINDOWS])
def test_configuration_file(tmp_path: Path, layer_types: str | None) -> None:
    written = config(layer_types, rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    written.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "lckv-llama"
    assert content["compression"]["layer_types"] == layer_types
    assert "layer_types" not in content  # which transformers takes for its own
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.to_diff_dict() == written.to_diff_dict()
    assert read.compression_config() == written.compression_config()


def test_configurations_are_saved_with_their_code(tmp_path: Path) -> None:
    written = config(SHARED, MERGING)
    before = written.to_dict()
    written.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name, text in modelling_files("dmc").items():
        assert (tmp_path / name).read_text() == text
    assert written.to_dict() == before  # nothing of it stays in memory
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.to_dict() == {**before, "_name_or_path": str(tmp_path)}


def test_code_is_saved_in_its_own_form_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`register_for_auto_class`, which Hugging Face's guides call, makes transformers copy files that need
    the package."""
    monkeypatch.setattr(LCKVLlamaConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(LCKVLlamaForCausalLM, "_auto_class", "AutoModelForCausalLM")
    model(SHARED).save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.py")} == modelling_files("dense")
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_weights_are_saved_where_code_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path, policy: str) -> dict[str, str]:
        raise ValueError("a relative import")

    monkeypatch.setattr(configuration_lckv_llama, "write_modelling_files", fail)
    one = model(SHARED)
    one.save_pretrained(tmp_path)
    assert "is saved without modelling files, so that it loads only where lckv is installed" in caplog.text
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    ids = tokens(1, 6)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, one(ids).logits)


def test_other_dtypes(tmp_path: Path) -> None:
    one, ids = model(SHARED), tokens(1, 6)
    one.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(ids).logits, model(SHARED).bfloat16()(ids).logits)
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_attention_implementation(tmp_path: Path) -> None:
    one, ids = model(SHARED), tokens(1, 6)
    one.save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    close(eager(ids).logits, one(ids).logits)
    with pytest.raises(ValueError, match="flex"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flex_attention")


def test_base_model_from_a_folder_with_a_head(tmp_path: Path) -> None:
    one = model(SHARED)
    one.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, LCKVLlamaModel)
    assert torch.equal(base.layers[3].mlp.up_proj.weight, one.model.layers[3].mlp.up_proj.weight)


def test_missing_and_surplus_weights_are_reported(tmp_path: Path) -> None:
    model(SHARED).save_pretrained(tmp_path)
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["compression"]["layer_types"] = "0_1_2_2"
    (tmp_path / "config.json").write_text(json.dumps(changed))
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv"}


def test_larger_vocabulary() -> None:
    one, ids = model(SHARED, tie_word_embeddings=True), tokens(1, 6)
    expected = one(ids).logits
    one.resize_token_embeddings(70)
    assert one.config.vocab_size == 70
    logits = one(ids, labels=ids).logits
    assert logits.shape[-1] == 70
    close(logits[..., :61], expected)

"""Layers that mix keys and values of others into their own (YOCO++): the numbers recorded from the public
code, and the same numbers token by token, in pieces and in parallel."""

import json
from pathlib import Path

import pytest
import torch

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.golden.lckv_models import Golden
from tests.golden.yocopp_models import NAMES, load
from tests.lckv.models.tiny import close, config, model, tokens

_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "rope_theta",
)  # fmt: skip


def _model(golden: Golden) -> LCKVLlamaForCausalLM:
    """Its config is as the public code saves it."""
    fields = {name: golden.header[name] for name in _FIELDS}
    fields |= {"layer_types": golden.header["layer_types"].replace("+0", ""), "method": "yoco-plus"}
    fields |= {"scaling_factor": 35.0, "bos_token_id": None, "eos_token_id": None}
    settings = LCKVLlamaConfig(**fields)
    assert settings.compression["layer_types"] == golden.header["layer_types"]
    built = LCKVLlamaForCausalLM(settings)
    own = built.state_dict()
    assert own.keys() == {name for name in golden.tensors if name.endswith("weight")}
    built.load_state_dict({name: golden.tensors[name] for name in own})
    return built


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits_loss_and_gradients(name: str, checkpointing: bool) -> None:
    golden = load(name)
    trained, tolerance = _model(golden).train(), golden.tolerance
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    output = trained(golden.tensors["input_ids"], labels=golden.tensors["labels"])
    close(output.logits, golden.tensors["logits"], tolerance["logits"])
    close(output.loss, golden.tensors["loss"].reshape(()), tolerance["loss"])
    output.loss.backward()
    for parameter_name, parameter in trained.named_parameters():
        expected = golden.gradients[f"grad.{parameter_name}"]
        close(parameter.grad, expected, tolerance["grad_rel"] * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_recorded_cache_token_by_token(name: str) -> None:
    golden = load(name)
    read, cache, logits = _model(golden).eval(), None, []
    with torch.no_grad():
        for token in golden.tensors["input_ids"].split(1, 1):
            output = read(token, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
    tolerance = golden.tolerance
    close(torch.cat(logits, 1), golden.tensors["logits_sequential"], tolerance["logits_sequential"])
    for layer in golden.header["owners"]:
        held = cache.slots._layers[layer].past
        close(held.key, golden.tensors[f"cache_k.{layer}"], tolerance["cache"])
        close(held.value, golden.tensors[f"cache_v.{layer}"], tolerance["cache"])


@pytest.mark.parametrize("name", NAMES)
def test_recorded_prompt_and_answer(name: str) -> None:
    golden = load(name)
    prompt, expected = golden.tensors["input_ids"][:, : golden.header["prompt"]], golden.tensors["generated"]
    read = _model(golden).eval()
    with torch.no_grad():
        close(read(prompt, logits_to_keep=1).logits, golden.tensors["eval_prompt_logits"], 1e-4)
    output = read.generate(
        prompt, max_new_tokens=expected.shape[1], do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.sequences[:, prompt.shape[1] :], expected.long())
    close(torch.stack(output.logits, 1), golden.tensors["generated_logits"], 1e-4)


def test_published_configs_are_read() -> None:
    fields = {"num_hidden_layers": 3, "layer_types": "0s_1s_1", "scaling_factor": 20.0, "sliding_window": 4}
    compression = LCKVLlamaConfig(**fields, method="yoco-plus").compression_config()
    assert (compression.layer_types, compression.mix_scaling_factor) == ("0s_1+0s_1", 20.0)
    assert compression.sliding_window == 4
    plain = LCKVLlamaConfig(**fields, method="yoco").compression
    assert (plain["layer_types"], "mix_scaling_factor" in plain) == ("0s_1s_1", False)
    for method, layer_types, said in (
        ("fusedkv", "0_1_1", "method is 'fusedkv'; of the published ones yoco and yoco-plus are read"),
        ("yoco-plus", None, "method is 'yoco-plus' and layer_types is None; layer 0"),
        ("yoco-plus", "1_1_1", "the map must begin with 0"),
    ):
        with pytest.raises(ValueError, match=said):
            LCKVLlamaConfig(num_hidden_layers=3, layer_types=layer_types, method=method)


def test_configs_of_other_maps_are_as_they_were(tmp_path: Path) -> None:
    for layer_types, written in (("0_0_2_2", False), (None, False), ("0_1+0_2", True)):
        folder = tmp_path / str(layer_types)
        config(layer_types).save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())["compression"]
        assert ("mix_scaling_factor" in saved) == written


def test_weights_begin_as_if_nothing_were_mixed_in() -> None:
    mixing, plain = config("0_1+0_2+1_2"), config("0_1_2_2")
    torch.manual_seed(0)
    one = LCKVLlamaForCausalLM(mixing).eval()
    other = LCKVLlamaForCausalLM(plain).eval()
    assert torch.equal(one.model.layers[1].self_attn.key_weight, torch.tensor([0.0, 1 / 35]))
    other.load_state_dict({name: one.state_dict()[name] for name in other.state_dict()})
    with torch.no_grad():
        close(one(tokens(2, 9)).logits, other(tokens(2, 9)).logits)


def test_what_is_not_given_is_an_error() -> None:
    layer = model("0_1+0_2").model.layers[1].self_attn
    states = torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match="layer 1 mixes the keys and values of layer 0 into its own, which"):
        layer.mixed(states, states, None)

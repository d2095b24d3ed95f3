"""Layers that mix keys and values of others into their own (YOCO++): the numbers recorded from the public
code, and the same numbers token by token, in pieces and in parallel."""

import pytest
import torch
from torch import Tensor

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.golden.lckv_models import Golden
from tests.golden.yocopp_models import NAMES, load
from tests.lckv.models.tiny import close, model, tokens

_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "rope_theta", "layer_types",
)  # fmt: skip


def _model(golden: Golden) -> LCKVLlamaForCausalLM:
    fields = {name: golden.header[name] for name in _FIELDS}
    built = LCKVLlamaForCausalLM(LCKVLlamaConfig(**fields, bos_token_id=None, eos_token_id=None))
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

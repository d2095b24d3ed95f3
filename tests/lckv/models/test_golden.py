"""The recorded models of golden/lckv, loaded as their authors published them: a flat configuration, weights
by name."""

import pytest
import torch
from torch import Tensor

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.golden.lckv_models import NAMES, Golden

_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "rope_theta", "layer_types", "forward_passes", "backward_passes",
    "sliding_window", "force_nodiag",
)  # fmt: skip


def load(golden: Golden) -> LCKVLlamaForCausalLM:
    fields = {name: golden.header[name] for name in _FIELDS}
    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(**fields, bos_token_id=None, eos_token_id=None))
    own = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in golden.tensors.items() if name in own})
    assert {name for name in golden.tensors if name.endswith((".weight", ".bias"))} == own
    return model


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_and_gradients(name: str, implementation: str, checkpointing: str | None) -> None:
    golden = Golden.load(name)
    model = load(golden).train()
    model.set_attn_implementation(implementation)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    output = model(golden.tensors["input_ids"], labels=golden.tensors["labels"])
    close(output.logits, golden.tensors["logits"], golden.tolerance["logits"])
    close(output.loss, golden.tensors["loss"], golden.tolerance["loss"])
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        expected = golden.gradients[f"grad.{parameter_name}"]
        close(parameter.grad, expected, golden.tolerance["grad_rel"] * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token(name: str) -> None:
    golden = Golden.load(name)
    model, cache, logits = load(golden).eval(), None, []
    with torch.no_grad():
        for token in golden.tensors["input_ids"].split(1, 1):
            output = model(token, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
    close(torch.cat(logits, 1), golden.tensors["logits_sequential"], golden.tolerance["logits_sequential"])


@pytest.mark.parametrize("name", NAMES)
def test_generation(name: str) -> None:
    golden = Golden.load(name)
    prompt, expected = golden.tensors["input_ids"][:, :12], golden.tensors["generated"]
    output = load(golden).generate(
        prompt,
        max_new_tokens=expected.shape[1],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[:, 12:], expected)
    close(
        torch.stack(output.logits, 1),
        golden.tensors["generated_logits"],
        golden.tolerance["generated_logits"],
    )

"""Layers that only read, and read two others: a learned mixture of both (`2+0`), or the keys of one and the
values of the other (`2/0`)."""

import pytest
import torch

from lckv.models.layers import Tokens
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.models.tokens import Layout
from lckv.policies.base import TokenContext, unturned
from tests.lckv.models.tiny import MERGING, TWO_SOURCES, close, config, model, tokens
from tests.lckv.models.token_by_token import TokenByToken

MAPS = (*TWO_SOURCES, "0_1+0_4_1+0_4_4/1", "0s_1s_1/0s_1+0s_4")


@pytest.mark.parametrize("layer_types", MAPS)
def test_formulas_at_once_in_pieces_and_token_by_token(layer_types: str) -> None:
    read, text = model(layer_types).double(), tokens(1, 11)
    expected = TokenByToken(read).logits(text[0].tolist())
    with torch.no_grad():
        close(read(text, use_cache=False).logits[0], expected, 3e-6)  # RoPE has float32 angles
        for sizes in ([1] * 11, [5, 4, 2]):
            cache, logits = None, []
            for piece in text.split(sizes, 1):
                output = read(piece, past_key_values=cache)
                cache = output.past_key_values
                logits.append(output.logits[0])
            close(torch.cat(logits), expected, 3e-6)
    assert cache is not None and set(cache.slots._layers) == set(read.model.layer_types.kv_layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_weights_that_mix(checkpointing: bool) -> None:
    """Against differences of what the formulas say."""
    trained, text = model(TWO_SOURCES[0]).double().train(), tokens(1, 7)
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    trained(text).logits.square().mean().backward()
    attention = trained.model.layers[4].self_attn
    formulas, step = TokenByToken(trained), 1e-5
    for kind, place in (("key", 0), ("value", 1)):
        weight = formulas.weights[f"model.layers.4.self_attn.{kind}_weight"]
        sizes = []
        for shift in (step, -2 * step):
            weight[place] += shift
            formulas.kept = [[] for _ in formulas.kept]
            sizes.append(formulas.logits(text[0].tolist()).square().mean())
        weight[place] += step
        expected = (sizes[0] - sizes[1]) / (2 * step)
        found = getattr(attention, f"{kind}_weight").grad[place]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found.abs() > 0.1


def test_weights_begin_as_those_of_a_plain_reader() -> None:
    torch.manual_seed(0)
    one = LCKVLlamaForCausalLM(config("0_1_1+0")).eval()
    other = LCKVLlamaForCausalLM(config("0_1_1")).eval()
    assert torch.equal(one.model.layers[2].self_attn.key_weight, torch.tensor([0.0, 1 / 35]))
    other.load_state_dict({name: one.state_dict()[name] for name in other.state_dict()})
    with torch.no_grad():
        close(one(tokens(2, 9)).logits, other(tokens(2, 9)).logits)


def test_policies_that_drop_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 2 reads two layers, and the policy dmc does not keep every"):
        config("0_1_1/0", MERGING)


def test_what_is_not_given_is_an_error() -> None:
    attention = model("0_1_1/0").model.layers[2].self_attn
    with pytest.raises(
        ValueError, match="layer 2 reads the keys and values of layer 1, which were not given"
    ):
        attention(torch.zeros(1, 1, 32), None, Tokens({2: TokenContext(unturned)}, Layout(), None))

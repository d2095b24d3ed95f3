"""The learned first guess in the Hugging Face model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lckv.generation.prefill import Settling
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from tests.lckv.generation.engines import GREEDY, engine
from tests.lckv.models.test_training import trained
from tests.lckv.models.tiny import CYCLIC, TWO_GROUPS, close, config, tokens


def guessing(layer_types: str, *, zero: bool = False, **compression: object) -> LCKVLlamaForCausalLM:
    """In evaluation, with random guesses unless `zero`."""
    torch.manual_seed(0)
    settings = config(layer_types)
    settings.compression |= {"first_guess": True, **compression}
    model = LCKVLlamaForCausalLM(settings).eval()
    if not zero:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "first_guess" in name:
                    parameter.normal_(0.0, 0.3)
    return model


def logits(model: LCKVLlamaForCausalLM, ids: Tensor, iteration: Iteration) -> Tensor:
    with torch.no_grad():
        states = model.model.run(model.model.embed_tokens(ids), iteration=iteration).last_hidden_state
        return model.lm_head(states)


@pytest.mark.parametrize("layer_types", [CYCLIC, TWO_GROUPS])
def test_guesses_begin_at_zero_and_so_as_published(layer_types: str) -> None:
    model, ids = guessing(layer_types, zero=True), tokens(2, 12)
    sources = model.model.layer_types.cyclic_sources
    names = {name for name, _ in model.named_parameters() if "first_guess" in name}
    assert names == {
        f"model.layers.{layer}.self_attn.first_guess_{kind}_proj.weight" for layer in sources for kind in "kv"
    }
    for passes in (1, 2, 3):
        published = logits(model, ids, Iteration(passes, first_guess=False))
        close(logits(model, ids, Iteration(passes)), published, 1e-6)


@pytest.mark.parametrize("layer_types", [CYCLIC, TWO_GROUPS])
def test_decoding_does_not_depend_on_the_guess(layer_types: str) -> None:
    """With as many passes as tokens a prompt is exact, from whatever guess; with few it is not."""
    model, ids = guessing(layer_types), tokens(2, 12)
    exact = logits(model, ids, Iteration(12, first_guess=False))
    close(logits(model, ids, Iteration(12)), exact)
    assert (logits(model, ids, Iteration(1)) - exact).abs().max() > 1e-2
    prompt = model(ids[:, :7], use_cache=True)  # and a prompt behind a prompt
    rest = model(ids[:, 7:], past_key_values=prompt.past_key_values).logits
    close(rest, exact[:, 7:])


def test_the_error_is_that_of_the_first_guess() -> None:
    """Against the formula, in a model whose cyclic group begins at the embedding."""
    model, ids = guessing("1_1", forward_passes=1, backward_passes=1), tokens(2, 6)
    attention = model.model.layers[1].self_attn
    seen: list[tuple[Tensor, Tensor]] = []
    keys_values = attention.keys_values

    def spied(*arguments, **options):
        own = keys_values(*arguments, **options)
        seen.append(own.extension[:2])
        return own

    attention.keys_values = spied
    error = model(ids, use_cache=False).statistics["first_guess_error"]
    embedded = model.model.embed_tokens(ids).detach().double()
    normed = embedded / (embedded.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    key, value = (
        (normed @ getattr(attention, f"first_guess_{kind}_proj").weight.detach().double().T)
        .unflatten(-1, (2, 8))
        .transpose(0, 1)
        for kind in "kv"
    )
    last_key, last_value = (tensor.detach().double() for tensor in seen[-1])
    # rotation keeps lengths of pairs of channels, so values are compared as they are and keys turned back
    angles = torch.arange(6)[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    first, second = last_key.chunk(2, -1)
    last_key = torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
    expected = sum(
        (mine - right).square().sum((0, 3)) / right.square().sum((0, 3)) / 2
        for mine, right in ((key, last_key), (value, last_value))
    )
    close(error[0], expected.float(), 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    one = guessing(TWO_GROUPS, forward_passes=1, agreement_loss_coefficient=0.5)
    loss, gradients = trained(one)
    one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, same = trained(one)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        close(same[name], gradient, 1e-6 * max(1.0, gradient.abs().max().item()))
        assert gradient.count_nonzero() > 0


def test_the_guess_learns_and_the_rest_of_the_model_does_not_notice_its_loss() -> None:
    plain, weighed = (
        guessing(CYCLIC, forward_passes=1, backward_passes=1, first_guess_loss_coefficient=weight)
        for weight in (0.0, 10.0)
    )
    _, without = trained(plain)
    _, with_loss = trained(weighed)
    for name, gradient in with_loss.items():
        if "first_guess" in name:
            assert without[name].count_nonzero() == 0
            assert gradient.count_nonzero() > 0
        else:
            assert torch.equal(gradient, without[name]), name
    optimizer = torch.optim.AdamW([p for n, p in weighed.named_parameters() if "first_guess" in n], lr=0.02)
    errors = []
    for _ in range(30):
        optimizer.zero_grad()
        output = weighed(tokens(4, 12), use_cache=False)
        output.auxiliary_loss.backward()
        optimizer.step()
        errors.append(float(output.statistics["first_guess_error"].mean()))
    assert errors[-1] < 0.7 * errors[0]


def perfect() -> LCKVLlamaForCausalLM:
    """A model whose keys and values can be guessed."""
    model = guessing(CYCLIC)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        attention = model.model.layers[3].self_attn
        attention.first_guess_k_proj.weight.copy_(attention.k_proj.weight)
        attention.first_guess_v_proj.weight.copy_(attention.v_proj.weight)
    return model


def test_a_perfect_guess_settles_in_one_pass() -> None:
    """Where attention and MLP add nothing, keys and values are linear in the normalised input: it can be
    guessed, and the second pass confirms it; from zeros the third does."""
    model, ids = perfect(), tokens(2, 9)
    needed = []
    for first_guess in (True, False):
        settling = Settling(1e-4, 9, 2, None, key_bias=None, device=ids.device, guessed=first_guess)
        logits(model, ids, Iteration(9, settling, first_guess=first_guess))
        needed.append(settling.passes.tolist())
    assert needed == [[2, 2], [3, 3]]


def test_the_engine_reads_the_guess() -> None:
    one = engine(perfect(), prefill_tolerance=1e-4)
    (answer,) = one.generate([tokens(1, 9)[0].tolist()], GREEDY)
    assert answer.prefill_passes == 2


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = guessing(CYCLIC, forward_passes=1), tokens(1, 8)
    model.save_pretrained(tmp_path)
    again = LCKVLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)

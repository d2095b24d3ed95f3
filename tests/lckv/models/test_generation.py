"""transformers' `generate` with this model's own cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.models.cache import LCKVCache
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.test_modeling import any_model, padded
from tests.lckv.models.tiny import CYCLIC, CYCLIC_WINDOWS, PLAIN, SHARED, WINDOWS, close, model, tokens


def generate(one: LCKVLlamaForCausalLM, ids: Tensor, new: int = 8, **options: Any) -> Tensor:
    return one.generate(ids, max_new_tokens=new, **{"do_sample": False, **options})


@any_model
def test_left_padded_batch_is_what_its_rows_are_alone(
    layer_types: str | None, policy: DMCConfig | None
) -> None:
    one = model(layer_types, policy)
    rows = [tokens(1, length, seed=length)[0] for length in (7, 3, 1)]
    ids, mask = padded(rows, [0, 4, 6], 7)
    batch = generate(one, ids, attention_mask=mask)
    for row, found in zip(rows, batch, strict=True):
        assert torch.equal(generate(one, row[None])[0, len(row) :], found[7:])


@any_model
def test_with_and_without_cache(layer_types: str | None, policy: DMCConfig | None) -> None:
    one, ids = model(layer_types, policy), tokens(2, 4)
    options = {"output_logits": True, "return_dict_in_generate": True}
    with_cache, without = (generate(one, ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    close(torch.stack(with_cache.logits), torch.stack(without.logits), 1e-4)
    assert isinstance(with_cache.past_key_values, LCKVCache)
    assert with_cache.past_key_values.get_seq_length() == 11


@pytest.mark.parametrize("layer_types", [SHARED, CYCLIC, CYCLIC_WINDOWS])
@pytest.mark.parametrize("merges", [False, True])
def test_beam_search(layer_types: str, merges: bool) -> None:
    policy = DMCConfig(stage="finetune", initial_decision_bias=0.25) if merges else None
    if merges and "s" in layer_types:
        layer_types = PLAIN
    one, ids = model(layer_types, policy), tokens(2, 4)
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = generate(one, ids, 6, **options)
    assert found.shape == (4, 10)
    assert torch.equal(found, generate(one, ids, 6, use_cache=False, **options))


def test_sampling_several_sequences() -> None:
    one, ids = model(CYCLIC), tokens(2, 5)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generate(one, ids, do_sample=True, top_k=5, num_return_sequences=3, use_cache=use_cache))
    assert found[0].shape == (6, 13)
    assert torch.equal(*found)
    assert len(found[0].unique(dim=0)) == 6


@any_model
def test_prompt_in_chunks(layer_types: str | None, policy: DMCConfig | None) -> None:
    one, (first, second) = model(layer_types, policy), tokens(2, 10)
    ids, mask = padded([first, second[:5]], [0, 5], 10)  # the first chunk has nothing of the second row
    whole = generate(one, ids, attention_mask=mask)
    assert torch.equal(whole, generate(one, ids, attention_mask=mask, prefill_chunk_size=4))


def test_a_conversation_goes_on_with_its_cache() -> None:
    one, ids = model(CYCLIC), tokens(1, 4)
    cache = LCKVCache(one.config)
    first = generate(one, ids, 3, past_key_values=cache)
    assert cache.get_seq_length() == 6
    longer = torch.cat((first, tokens(1, 4, seed=9)), 1)
    assert torch.equal(generate(one, longer, 5, past_key_values=cache), generate(one, longer, 5))


def test_finished_rows_are_filled_up() -> None:
    one, ids = model(SHARED), tokens(2, 5)
    plain = generate(one, ids)
    stop = int(plain[0, 7])
    found = generate(one, ids, eos_token_id=stop, pad_token_id=0)
    length = 1 + (plain[0, 5:] == stop).nonzero()[0].item()
    assert torch.equal(found[0, : 5 + length], plain[0, : 5 + length])
    assert not found[0, 5 + length :].any()


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC, WINDOWS, CYCLIC_WINDOWS])
def test_assisted_decoding_equals_greedy(layer_types: str | None) -> None:
    one = model(layer_types)
    ids = tokens(1, 4).repeat(1, 2)
    expected = generate(one, ids, 12)
    assert torch.equal(generate(one, ids, 12, prompt_lookup_num_tokens=3), expected)
    helper = model(SHARED)
    with torch.no_grad():
        helper.lm_head.weight.copy_(one.lm_head.weight)
    helper.generation_config.num_assistant_tokens = 4
    assert torch.equal(generate(one, ids, 12, assistant_model=helper), expected)


def test_assisted_decoding_is_refused_where_tokens_are_merged() -> None:
    one = model(SHARED, DMCConfig(stage="finetune"))
    with pytest.raises(
        ValueError, match=r"assisted decoding forgets the tokens that it rejects, .*prompt_lookup_num_tokens"
    ):
        generate(one, tokens(1, 6), prompt_lookup_num_tokens=2)


def test_the_first_layers_alone_are_no_assistant() -> None:
    one = model(SHARED)
    with pytest.raises(ValueError, match=r"assistant_early_exit is 1; the first layers alone .*leave it out"):
        generate(one, tokens(1, 6), assistant_early_exit=1)
    assert one.config.num_hidden_layers == len(one.model.layers)


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_other_caches_are_refused(implementation: str) -> None:
    with pytest.raises(
        ValueError, match=f"cache_implementation is '{implementation}'; this model has a cache of its own"
    ):
        generate(model(), tokens(1, 3), cache_implementation=implementation)


def test_generation_from_embeddings() -> None:
    one, ids = model(CYCLIC), tokens(2, 5)
    found = one.generate(inputs_embeds=one.model.embed_tokens(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, generate(one, ids, 6)[:, 5:])


def test_hidden_states_of_generation() -> None:
    output = generate(model(SHARED), tokens(1, 5), 3, output_hidden_states=True, return_dict_in_generate=True)
    assert [[len(states), *states[-1].shape[:2]] for states in output.hidden_states] == [
        [5, 1, 5],
        [5, 1, 1],
        [5, 1, 1],
    ]

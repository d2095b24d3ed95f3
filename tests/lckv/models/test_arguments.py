"""Every argument of a forward pass is read or refused: those of transformers' LlamaModel and
LlamaForCausalLM, and all others."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils import TransformersKwargs

from lckv.models.cache import CACHE_NAME, CACHE_NAMES, LCKVCache
from lckv.models.outputs import LCKVModelOutput, LCKVOutput
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.test_modeling import any_model
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, SHARED, close, model, tokens

IDS = tokens(2, 6)
SPLIT = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3]])
"""The sequence of each token, as `seq_idx` says it."""
RESTARTS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
LENGTHS = torch.tensor([0, 3, 6, 8, 12])

SAME: dict[str, list[Any]] = {
    "attention_mask": [None, torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool)],
    "position_ids": [None, torch.arange(6)[None], torch.arange(6).expand(2, -1), torch.arange(6)[None] + 7],
    "past_key_values": [None],
    "cache": [None],
    "inputs_embeds": [None],
    "use_cache": [None, False, True],
    "output_hidden_states": [None, False],
    "output_attentions": [None, False],
    "output_router_logits": [None, False],
    "is_causal": [None, True],
    "return_dict": [None, True],
    "cache_position": [None, torch.arange(6)],
    "num_items_in_batch": [None, torch.tensor(3)],
    "cu_seq_lens_q": [None, torch.tensor([0, 6, 12])],
    "cu_seq_lens_k": [None, torch.tensor([0, 6, 12], dtype=torch.int32)],
    "max_length_q": [None],
    "max_length_k": [None],
    "seq_idx": [None, torch.tensor([[3] * 6, [4] * 6])],
}
"""Values that ask for nothing else than what is done anyway."""

OTHERS: dict[str, list[Any]] = {
    "attention_mask": [torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])],
    "position_ids": [RESTARTS, torch.tensor([[0, 1, 2, 5, 6, 7]])],
    "cu_seq_lens_q": [LENGTHS],
    "cu_seq_lens_k": [LENGTHS],
    "seq_idx": [SPLIT],
}
"""Values that change the logits."""

REFUSED: dict[str, list[tuple[Any, str]]] = {
    "attention_mask": [(torch.ones(2, 1, 6, 6), r"attention_mask has shape \[2, 1, 6, 6\]; it must be")],
    "position_ids": [(torch.arange(5)[None], r"position_ids has shape \[1, 5\]; it must be \[2, 6\]")],
    **{
        name: [((), rf"{CACHE_NAME} is a tuple; .* pass an LCKVCache\(model.config\)")]
        for name in CACHE_NAMES
    },
    "inputs_embeds": [(torch.zeros(2, 6, 32), "give either input_ids or inputs_embeds")],
    "output_hidden_states": [(9, "output_hidden_states is 9; there are [4-6] hidden states, 0 .. [3-5]")],
    "output_attentions": [(True, "output_attentions is True: attention weights are never .* leave it out")],
    "output_router_logits": [(True, "output_router_logits is True: this model has no experts; leave it out")],
    "is_causal": [(False, "is_causal is False: the sharing map says what a query sees.* leave it out")],
    "cache_position": [(torch.arange(1, 7), r"cache_position is \[1, 2, 3, 4, 5, 6\]; behind 0 columns .*")],
    "cu_seq_lens_q": [(torch.tensor([0, 6]), r"cu_seq_lens_q is \[0, 6\]; .* from 0 to 12, and every row")],
    "cu_seq_lens_k": [(torch.tensor([0, 7, 12]), "cu_seq_lens_k is .* every row must begin a sequence")],
    "max_length_q": [(6, "max_length_q is 6, but no sequence boundaries are given")],
    "max_length_k": [(6, "max_length_k is 6, but no sequence boundaries are given")],
    "seq_idx": [(torch.zeros(6), r"seq_idx has shape \[6\]; it must be \[2, 6\]")],
    "attention_masks": [(torch.ones(2, 6), "argument attention_masks = a tensor of shape .* does not read")],
    "token_type_ids": [
        (None, "argument token_type_ids = None, which this model does not read; leave it out")
    ],
}


def test_the_tables_hold_all_that_llama_takes() -> None:
    named = {*inspect.signature(LlamaForCausalLM.forward).parameters, *TransformersKwargs.__optional_keys__}
    with_head = {"labels", "logits_to_keep"}
    assert named - with_head - {"self", "input_ids", "kwargs"} <= {*SAME}
    assert {*OTHERS, *REFUSED} - {"attention_masks", "token_type_ids"} <= {*SAME}


@any_model
def test_every_argument(layer_types: str | None, policy: DMCConfig | None) -> None:
    one = model(layer_types, policy, forward_passes=4)
    whole = one.model(IDS).last_hidden_state
    with torch.no_grad():
        for head in (False, True):
            called, expected = (one, one.lm_head(whole)) if head else (one.model, whole)
            for name, values in SAME.items():
                for value in values:
                    found = called(IDS, **{name: value})[0 if not head else "logits"]
                    close(found, expected, 2e-5 if policy is None else 5e-4)  # rounding at other positions
            for name, values in OTHERS.items():
                for value in values:
                    found = called(IDS, **{name: value})[0 if not head else "logits"]
                    assert (found - expected).abs().max() > 1e-3, name
            for name, refusals in REFUSED.items():
                for value, message in refusals:
                    with pytest.raises((ValueError, TypeError), match=message):
                        called(IDS, **{name: value})


@any_model
def test_packed_sequences_do_not_see_each_other(layer_types: str | None, policy: DMCConfig | None) -> None:
    one = model(layer_types, policy, forward_passes=4)
    with torch.no_grad():
        expected = one(IDS, position_ids=RESTARTS, use_cache=False).logits
        for packing in (
            {"cu_seq_lens_q": LENGTHS},
            {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "max_length_q": 4, "max_length_k": 9},
            {"seq_idx": SPLIT},
            {"seq_idx": SPLIT, "cu_seq_lens_k": LENGTHS, "position_ids": RESTARTS},
        ):
            close(one(IDS, use_cache=False, **packing).logits, expected)
            close(one.lm_head(one.model(IDS, **packing).last_hidden_state), expected)


def test_names_are_told_with_their_value_and_the_way_out() -> None:
    for called in (model(), model().model):
        with pytest.raises(
            TypeError, match=r"got the argument use_cash = True, .* it reads input_ids, .*use_c"
        ):
            called(IDS, use_cash=True)


@pytest.mark.parametrize("return_dict", [False, True])
def test_return_dict(return_dict: bool) -> None:
    one = model(SHARED, MERGING)
    for called, kind in ((one, LCKVOutput), (one.model, LCKVModelOutput)):
        output = called(IDS, return_dict=return_dict, use_cache=False)
        assert isinstance(output, kind if return_dict else tuple)
        assert torch.is_tensor(output[0])
        one.config.return_dict = return_dict
        assert isinstance(called(IDS, use_cache=False), kind if return_dict else tuple)
        assert isinstance(called(IDS, return_dict=not return_dict), tuple if return_dict else kind)


@pytest.mark.parametrize("name", ["output_attentions", "is_causal"])
def test_settings_of_the_configuration_are_refused_alike(name: str) -> None:
    one = model()
    one.set_attn_implementation("eager")
    setattr(one.config, name, name == "output_attentions")
    for called in (one, one.model):
        with pytest.raises(ValueError, match=f"{name} is"):
            called(IDS)


@pytest.mark.parametrize(
    ("chosen", "indices"), [(0, {0}), (-1, {3}), ([1, -2], {1, 2}), (True, {0, 1, 2, 3})]
)
def test_chosen_hidden_states(chosen: Any, indices: set[int]) -> None:
    one = model(PLAIN)
    states = one(IDS, output_hidden_states=True).hidden_states
    found = one(IDS, output_hidden_states=chosen).hidden_states
    assert {index for index, state in enumerate(found) if state is not None} == indices
    assert all(torch.equal(found[index], states[index]) for index in indices)


def test_logits_to_keep() -> None:
    one = model()
    logits = one(IDS).logits
    marked = torch.zeros(2, 6, dtype=torch.bool)
    marked[0, 1] = marked[1, 4] = True
    rows = torch.tensor([[0, 1], [5, 2]])
    kept: list[tuple[Any, Tensor]] = [
        (0, logits), (2, logits[:, -2:]), (torch.tensor([3]), logits[:, 3:4]), (marked, logits[marked]),
        (rows, torch.stack([logits[row, rows[row]] for row in range(2)])),
    ]  # fmt: skip
    for asked, expected in kept:
        close(one(IDS, logits_to_keep=asked).logits, expected)
    for wrong, message in (
        (-1, "logits_to_keep is -1; it must be the number of tokens"),
        (slice(-2, None), r"logits_to_keep is slice\(-2, None, None\); it must be the number of tokens"),
        (
            torch.ones(3, 2),
            r"logits_to_keep is a tensor \[3, 2\] of torch.float32; for 2 rows of 6 tokens it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            one(IDS, logits_to_keep=wrong)


def test_arguments_of_the_loss() -> None:
    one = model(SHARED)
    expected = one(IDS, labels=IDS).loss
    ignored = torch.where(SPLIT == 1, 7, IDS)
    close(
        one(IDS, labels=ignored, ignore_index=7).loss, one(IDS, labels=ignored.where(ignored != 7, -100)).loss
    )
    close(one(IDS, labels=IDS, num_items_in_batch=5).loss, expected * 2)
    shifted = torch.full_like(IDS, -100)
    shifted[:, :-1] = IDS[:, 1:]
    close(one(IDS, labels=torch.zeros_like(IDS), shift_labels=shifted).loss, expected)
    close(one(IDS, labels=IDS[:, 2:], logits_to_keep=4).loss, one(IDS, labels=IDS.clone().index_fill(
        1, torch.tensor([0, 1, 2]), -100)).loss)  # fmt: skip
    for options, message in (
        ({"shift_labels": IDS}, "shift_labels is given without labels, which it belongs to: give labels"),
        ({"ignore_index": 3}, "ignore_index is given without labels"),
        ({"labels": IDS[:, 1:]}, r"labels has shape \[2, 5\]; it must be \[2, 6\], one for each"),
        (
            {"labels": IDS, "logits_to_keep": 2},
            r"labels has shape \[2, 6\]; it must be \[2, 2\], .*logits_to_keep",
        ),
        ({"labels": IDS, "shift_labels": IDS[:1]}, r"shift_labels has shape \[1, 6\]; it must be \[2, 6\]"),
        ({"labels": IDS, "weight": None}, "got the argument weight = None, which this model does not read"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            one(IDS, **options)


def test_tokens_of_another_shape() -> None:
    one = model()
    with pytest.raises(
        ValueError, match=r"input_ids is a tensor \[6\] of torch.int64; it must be int \[batch, t"
    ):
        one(IDS[0])
    with pytest.raises(
        ValueError, match=r"inputs_embeds has shape \[2, 6, 5\]; it must be \[batch, tokens, 32\]"
    ):
        one(inputs_embeds=torch.zeros(2, 6, 5))


def test_a_cache_of_another_model() -> None:
    cache = LCKVCache(model(SHARED).config)
    with pytest.raises(
        ValueError, match=rf"{CACHE_NAME} is the cache of a model whose compression is .*0_0_2_2"
    ):
        model(CYCLIC)(IDS, past_key_values=cache)
    with pytest.raises(
        ValueError, match="whose num_hidden_layers is 4; this model's is 3: pass an LCKVCache"
    ):
        model(PLAIN)(IDS, past_key_values=cache)

"""What `generate` and its users ask of the cache, and what it keeps."""

import copy

import pytest
import torch
from torch import Tensor

from lckv.models.cache import CACHE_NAME, CACHE_NAMES, LCKVCache
from lckv.policies.dmc.config import DMCConfig
from tests.lckv.models.tiny import (
    CYCLIC,
    CYCLIC_WINDOWS,
    MERGING,
    PLAIN,
    SHARED,
    WINDOWS,
    close,
    model,
    tokens,
)


def filled(
    layer_types: str | None, policy: DMCConfig | None = None, rows: int = 2, length: int = 6, **fields
) -> LCKVCache:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(layer_types, policy, **fields)(tokens(rows, length)).past_key_values


def test_empty() -> None:
    cache = LCKVCache(model(SHARED).config)
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1
    assert not cache.is_initialized
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0]))
    assert repr(cache) == "LCKVCache(0 columns, 0 bytes)"
    with pytest.raises(ValueError, match="the cache is empty: it knows of no rows yet"):
        _ = cache.slots.seen


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_it_is_given_under_the_name_of_any_version_of_transformers(name: str) -> None:
    one, ids = model(CYCLIC), tokens(2, 9)
    with torch.no_grad():
        cache = one(ids[:, :6])[CACHE_NAME]
        first = one.lm_head(one.model(ids[:, 6:7], **{name: cache}).last_hidden_state)
        rest = one(ids[:, 7:], **{name: cache}).logits
        close(torch.cat((first, rest), 1), one(ids, use_cache=False).logits[:, 6:], 1e-4)
    whole = one.generate(ids, max_new_tokens=4, do_sample=False)
    cache = LCKVCache(one.config)
    given = {name: cache, "do_sample": False, "return_dict_in_generate": True}
    output = one.generate(ids, max_new_tokens=1, **given)
    assert output[CACHE_NAME] is cache
    assert torch.equal(one.generate(output.sequences, max_new_tokens=3, **given).sequences, whole)


def test_two_caches_are_one_too_many() -> None:
    one, cache = model(SHARED), filled(SHARED)
    with torch.no_grad():
        one(tokens(2, 1), cache=cache, past_key_values=cache)
    for called in (one, one.model):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            called(tokens(2, 1), cache=cache, past_key_values=filled(SHARED))


def test_filled_and_forgotten() -> None:
    cache = filled(SHARED)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (6, 2, True)
    cache.reset()
    assert (cache.get_seq_length(), cache.is_initialized, cache.slots.num_bytes) == (0, False, 0)


def test_rows_are_reordered_chosen_and_repeated() -> None:
    for policy in (None, MERGING):
        one, ids, next_ids = model(CYCLIC, policy), tokens(3, 6), tokens(3, 3, seed=1)
        with torch.no_grad():
            expected = one(torch.cat((ids, next_ids), 1), use_cache=False).logits[:, 6:]

            def continued(cache: LCKVCache, rows: list[int]) -> Tensor:
                return one(next_ids[rows], past_key_values=cache).logits  # noqa: B023

            cache = one(ids).past_key_values
            untouched = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            close(continued(cache, [2, 0, 0]), expected[[2, 0, 0]], 1e-4)
            cache = copy.deepcopy(untouched)
            cache.batch_select_indices(torch.tensor([1]))
            assert cache.batch_size == 1
            close(continued(cache, [1]), expected[[1]], 1e-4)
            cache = copy.deepcopy(untouched)
            cache.batch_repeat_interleave(2)
            close(continued(cache, [0, 0, 1, 1, 2, 2]), expected[[0, 0, 1, 1, 2, 2]], 1e-4)
            close(continued(untouched, [0, 1, 2]), expected, 1e-4)


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC, WINDOWS, CYCLIC_WINDOWS])
def test_newest_tokens_are_forgotten(layer_types: str | None) -> None:
    one, ids, others = model(layer_types), tokens(2, 10), tokens(2, 2, seed=5)
    with torch.no_grad():
        cache = one(ids).past_key_values
        cache.crop(-4)
        cache.crop(0)
        assert cache.get_seq_length() == 6
        found = one(others, past_key_values=cache).logits
        close(found, one(torch.cat((ids[:, :6], others), 1), use_cache=False).logits[:, 6:], 1e-4)
    assert cache.is_croppable
    with pytest.raises(
        ValueError, match="crop takes the number of tokens to remove as a negative number, not 3"
    ):
        cache.crop(3)


def test_merged_tokens_cannot_be_forgotten() -> None:
    cache = filled(SHARED, MERGING)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="the newest 2 tokens cannot be forgotten: layer 0 does not keep"):
        cache.crop(-2)
    assert cache.get_seq_length() == 6
    assert filled(SHARED, DMCConfig(stage="zero_out")).is_croppable


def test_windows_forget_only_what_they_keep() -> None:
    one, ids, others = model(WINDOWS), tokens(1, 80), tokens(1, 2, seed=5)
    with torch.no_grad():
        cache = one(ids).past_key_values
        cache.crop(-32)
        found = one(others, past_key_values=cache).logits
        close(found, one(torch.cat((ids[:, :48], others), 1), use_cache=False).logits[:, 48:], 1e-4)
        with pytest.raises(
            ValueError, match="the newest 3 tokens cannot be forgotten: layer 0 has a window of 3 tokens"
        ):
            cache.crop(-3)
        assert cache.get_seq_length() == 50
        longer = one(ids[:, :30]).past_key_values
        longer.crop(-29)  # no window has dropped anything that is needed
        close(
            one(others, past_key_values=longer).logits,
            one(torch.cat((ids[:, :1], others), 1)).logits[:, 1:],
            1e-4,
        )


def test_keys_that_some_layer_sees_as_a_whole_are_kept() -> None:
    one, ids = model("0s_0_2s_2s"), tokens(1, 60)
    with torch.no_grad():
        cache = one(ids[:, :50]).past_key_values
        close(one(ids[:, 50:], past_key_values=cache).logits, one(ids, use_cache=False).logits[:, 50:], 1e-4)
    assert cache.slots.lengths(0).max() == 60 > cache.slots.lengths(2).max()


def test_what_a_window_dropped_is_known_of_every_row() -> None:
    one, mask = model(WINDOWS), torch.ones(2, 80, dtype=torch.int64)
    mask[1, :75] = 0
    with torch.no_grad():
        cache = one(tokens(2, 80), attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="the newest 33 tokens cannot be forgotten: layer 0"):
        copy.deepcopy(cache).crop(-33)
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-4)
    assert cache.slots.seen.tolist() == [1]


def test_it_belongs_to_this_model() -> None:
    with pytest.raises(TypeError, match="LCKVCache is filled by LCKVLlamaForCausalLM only"):
        LCKVCache(model().config).update(torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize(
    ("layer_types", "layers"), [(None, 4), ("0_0_2_2", 2), ("0_3_3_3", 2), ("3_3_3_3", 1)]
)
def test_bytes_follow_the_layers_that_own_keys(layer_types: str | None, layers: int) -> None:
    cache = filled(layer_types, rows=2, length=40, num_hidden_layers=4)
    per_layer = (
        2 * 2 * 2 * 41 * 8 * 4 + 2 * 2 * 8
    )  # keys and values with a place to write nothing to; lengths
    assert cache.slots.num_bytes == layers * per_layer


@pytest.mark.parametrize("layer_types", [None, CYCLIC, "0_1_2_2"])
def test_the_product_of_both_compressions(layer_types: str | None) -> None:
    """Slots are those of the layers that own keys, divided by the compression that merge rates say."""
    one, ids = model(layer_types, MERGING, num_hidden_layers=4), tokens(2, 40)
    with torch.no_grad():
        rates, cache = one(ids, use_cache=False).statistics["merge_rate"], one(ids).past_key_values
    owners = one.model.layer_types.kv_layers
    slots = sum(int(cache.slots.lengths(layer).sum()) for layer in owners)
    assert rates.mean() > 0.2
    assert slots == pytest.approx(len(owners) * 2 * 2 * 40 * (1 - rates.mean().item()))


def test_long_windows_need_memory_for_the_window_only() -> None:
    one = model("0s_1s_2s")
    with torch.no_grad():
        long, longer = (one(tokens(1, length)).past_key_values for length in (100, 400))
        assert long.slots.num_bytes == longer.slots.num_bytes
        for token in tokens(1, 150).split(1, 1):
            one(token, past_key_values=long)
    assert long.slots.num_bytes < 2 * longer.slots.num_bytes + 1000
    assert max(long.slots.lengths(layer).max() for layer in range(3)) < 3 + 2 * 32


@pytest.mark.parametrize("policy", [None, MERGING])
def test_a_step_waits_for_the_device_once(policy: DMCConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To see whether there is padding; cache memory is made longer now and then."""
    one, ids = model(CYCLIC, policy), tokens(2, 20)
    mask = torch.ones(2, 26, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        cache = one(ids, attention_mask=mask[:, :20]).past_key_values
        one(ids[:, :1], attention_mask=mask[:, :21], past_key_values=cache)
        waits: list[str] = []
        for name in (
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "item",
            "tolist",
            "nonzero",
            "unique",
            "cpu",
        ):
            method = getattr(Tensor, name)
            monkeypatch.setattr(
                Tensor,
                name,
                lambda *args, name=name, method=method, **options: (
                    waits.append(name) or method(*args, **options)
                ),
            )
        for step in range(21, 26):
            one(
                ids[:, :1],
                attention_mask=mask[:, : step + 1],
                position_ids=mask[:, :step].sum(1, keepdim=True),
                past_key_values=cache,
            )
    assert waits.count("tolist") == 5
    assert [name for name in waits if name != "tolist"] in ([], ["__int__"], ["__int__"] * 2)


@pytest.mark.parametrize("policy", [None, MERGING])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("autocast", [(True, False), (False, True)], ids=["first", "later"])
def test_only_some_calls_are_under_autocast(
    policy: DMCConfig | None, padding: int, autocast: tuple[bool, bool]
) -> None:
    one, ids, cache = model(SHARED, policy), tokens(2, 9), None
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :padding] = 0
    with torch.no_grad():
        expected = one(ids, attention_mask=mask).logits
        for number, (start, stop) in enumerate(((0, 6), (6, 7), (7, 9))):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast[min(number, 1)]):
                output = one(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            cache = output.past_key_values
            close(output.logits.float()[:, -1], expected[:, stop - 1], 0.1)

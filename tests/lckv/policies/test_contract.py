"""What holds for every KV policy and every kind of map, without knowing which policy it is."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lckv.attention.key_bias import HIDDEN
from lckv.cache.streaming import StreamingCache
from lckv.cache.undecided import UndecidedCache
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.base import TokenContext
from lckv.rope import Turn, inverse_frequencies, rotation
from tests.lckv.cache.models import (
    cache_settings,
    contiguous_cache,
    logits,
    paged_cache,
    parallel_logits,
    text,
)
from tests.lckv.generation.engines import GREEDY, empty, engine
from tests.lckv.policies.cases import CASES, MAPS, POLICIES, fresh_model, model, policy_config, read_by

TOLERANCE = 2e-4
"""Of logits of up to about 10: float32 rounding, which cyclic layers amplify from token to token."""

every_policy = pytest.mark.parametrize("policy", POLICIES)
every_case = pytest.mark.parametrize(("policy", "name"), CASES)


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def caches(built: LCKVLlamaForCausalLM):
    """A cache of each kind as a model takes it, and the slots [g] of a layer in it."""
    contiguous, paged = contiguous_cache(built), paged_cache(built)
    yield contiguous, lambda layer: contiguous.lengths(layer)[0]
    sequence = paged.open()
    yield paged.rows([sequence]), partial(paged.lengths, sequence)


@every_case
def test_decoding_equals_the_parallel_model_and_slots_are_those_announced(policy: str, name: str) -> None:
    built, tokens = model(policy, name), text(24, 1)
    expected, settings = parallel_logits(built, tokens), policy_config(policy)
    for chunks in ([1] * 24, [2, 1, 1, 12, 7, 1], [24]):
        for cache, lengths in caches(built):
            start = 0
            for chunk in chunks:
                part = slice(start, start + chunk)
                close(logits(built, [tokens[part]], cache)[0], expected[part])
                start += chunk
            slots = torch.stack([lengths(layer) for layer in built.model.layer_types.kv_layers])
            if settings.traits.keeps_every_token:
                assert (slots == 24).all()
            elif settings.traits.merges:
                assert 4 < slots.float().mean() < 22
            elif settings.traits.token_wise:
                assert (slots == settings.slots(24, settings.compression_ratio)).all()
            else:  # what goes depends on the text
                assert settings.slots(24, 100.0) <= slots.min() < slots.max() <= 24
                assert 8 < slots.float().mean() < 22


@every_case
def test_attention_is_that_of_the_oracle(policy: str, name: str) -> None:
    """With its gradients, in training, with padding and packed sequences; and every parameter gets one."""
    gradients = []
    ids = torch.tensor([text(24, 2), text(24, 3)])
    for implementation in ("sdpa", "eager"):
        # a decision at a low temperature makes of rounding in float32 what is seen in gradients
        built = fresh_model(policy, name, attn_implementation=implementation).train().double()
        mask = torch.ones(2, 24, dtype=torch.int64)
        mask[1, :5] = 0
        position_ids = torch.stack((torch.arange(24) % 13, (torch.arange(24) - 5).clamp(min=0)))
        torch.manual_seed(3)
        output = built(ids, mask, position_ids, labels=ids.masked_fill(mask == 0, -100))
        output.loss.backward()
        gradients.append({key: parameter.grad for key, parameter in built.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient is not None and gradient.count_nonzero() > 0, key
        scale = max(1.0, float(gradients[1][key].abs().max()))
        close(gradient, gradients[1][key], 2e-4 * scale)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@every_case
def test_recomputing_changes_nothing(policy: str, name: str) -> None:
    ids, gradients = torch.tensor([text(12, 2)]), []
    for recomputing in (False, True):
        built = fresh_model(policy, name).train()
        if recomputing:
            built.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        built(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in built.parameters()])
    for one, other in zip(*gradients, strict=True):
        close(one, other, 1e-6 * max(1.0, float(one.abs().max())))


@every_policy
def test_statistics_are_those_announced(policy: str) -> None:
    built = fresh_model(policy, "CLA").train()
    ids = torch.tensor([text(12, 2), text(12, 3)])
    output = built(ids, labels=ids)
    announced = [statistic.name for statistic in built.model.policy.statistics]
    assert [*(output.statistics or {})] == announced
    for tensor in (output.statistics or {}).values():
        assert tensor.shape == (2, 2, 2) and tensor.dtype == torch.float32 and not tensor.requires_grad
    means = [tensor.mean((0, 2)) for tensor in (output.statistics or {}).values()]
    loss = built.model.policy.auxiliary_loss(means, 1.0) if announced else None
    assert (output.auxiliary_loss is None) == (loss is None)
    if loss is not None:
        close(output.auxiliary_loss, loss.mean(), 1e-6)
    report = built.model.policy.report(
        [tensor.double().mean(1) for tensor in (output.statistics or {}).values()], 0.1, 0.5
    )
    assert all(isinstance(number, float) for number in report.values())


@every_policy
@pytest.mark.parametrize("name", ["CLA", "LCKV", "without self"])
def test_engines_answer_as_generate_does(policy: str, name: str) -> None:
    """In one piece, in chunks, token by token, and with so few pages that requests give theirs to one
    another."""
    built, prompts = model(policy, name), [text(length, length) for length in (7, 3, 9)]
    params = replace(GREEDY, max_new_tokens=8)
    expected = [
        built.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    roomy = engine(built)
    pages = roomy.cache.pages_needed([roomy.cache.open()], 17)
    for tried in (
        engine(built),
        engine(built, prefill_chunk=4),
        engine(built, prefill="exact"),
        engine(built, pages=int(1.6 * pages)),
    ):
        answers = tried.generate(prompts, params)
        assert [list(answer.token_ids) for answer in answers] == expected
        assert empty(tried)


@every_policy
@pytest.mark.parametrize("name", ["CLA", "LCKV"])
def test_generate_with_padding_and_beams(policy: str, name: str) -> None:
    # As many passes as tokens, so that even without a cache layers that are iterated are exact.
    built = fresh_model(policy, name, compression={"forward_passes": 13})
    ids, mask = torch.tensor([text(9, 2), [0] * 4 + text(5, 3)]), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    for beams in (1, 2):
        options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 6}
        together = built.generate(ids, attention_mask=mask, **options)
        alone = built.generate(ids[1:, 4:], **options)
        assert torch.equal(together[1, 4:], alone[0])
        without_cache = built.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(together, without_cache)


@every_case
def test_saved_models_are_the_same(policy: str, name: str, tmp_path: Path) -> None:
    built, ids = model(policy, name), torch.tensor([text(12)])
    built.save_pretrained(tmp_path)
    again = LCKVLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.compression_config() == built.config.compression_config()
    assert torch.equal(again(ids, use_cache=False).logits, built(ids, use_cache=False).logits)


@every_policy
def test_bytes_are_those_allocated(policy: str) -> None:
    built = model(policy, "CLA")
    settings, contiguous = policy_config(policy), contiguous_cache(built)
    logits(built, [text(60)], contiguous)
    slots = max(int(contiguous.lengths(layer).max()) for layer in built.model.layer_types.kv_layers)
    fixed = 2 * 2 * (8 + 4 * settings.state_numbers(8))  # of two layers and heads: lengths and state
    per_slot = 2 * 2 * 2 * 8 * 4
    assert fixed + slots * per_slot <= contiguous.num_bytes <= fixed + (2 * slots + 1) * per_slot or (
        contiguous.num_bytes
        <= fixed + 61 * per_slot  # at first there is room for all tokens that come at once
    )
    paged = paged_cache(built, pages=60, max_sequences=3)
    assert paged.num_bytes == 61 * paged.bytes_per_page + 3 * paged.bytes_per_sequence
    dense = paged_cache(model("dense", "CLA"), pages=60, max_sequences=3)
    more = paged.bytes_per_sequence - dense.bytes_per_sequence
    assert more == 2 * 2 * 4 * settings.state_numbers(8)


@every_policy
def test_what_needs_every_token_is_refused_where_not_every_token_is_kept(policy: str) -> None:
    built, keeps = model(policy, "CLA"), policy_config(policy).traits.keeps_every_token
    settings = cache_settings(built)
    sizes = {"rows": 1, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu"}
    streaming = partial(
        StreamingCache, **settings, **sizes, frequencies=inverse_frequencies(8, 10000.0), window=16
    )
    output = built(torch.tensor([text(10)]))
    assert output.past_key_values.is_croppable == keeps
    if keeps:
        streaming()
        output.past_key_values.crop(-2)
        assert output.past_key_values.get_seq_length() == 8
        return
    with pytest.raises(ValueError, match=f"the KV policy is {settings['policy'].name}; streaming"):
        streaming()
    with pytest.raises(ValueError, match=r"newest 2 tokens cannot be forgotten: layer 0 does not keep every"):
        output.past_key_values.crop(-2)
    paged = paged_cache(built)
    view = paged.rows([paged.open()])
    logits(built, [text(10)], view)
    with pytest.raises(
        ValueError, match=r"newest 2 tokens cannot be forgotten: the KV policy .* does not keep"
    ):
        view.drop_newest(2)
    with pytest.raises(ValueError, match=r"assisted decoding .* with the policy"):
        built.generate(torch.tensor([text(10)]), prompt_lookup_num_tokens=2, max_new_tokens=3)


@every_policy
def test_windows_and_dropout_are_refused_where_they_cannot_be(policy: str) -> None:
    traits = policy_config(policy).traits
    assert not (traits.windows and traits.key_bias), "attention to keys with a bias has no windows"
    windows = {"layer_types": "0_0s_2_2", "sliding_window": 5}
    if traits.windows:
        fresh_model(policy, "CLA", compression=windows)
    else:
        with pytest.raises(
            ValueError, match=r"compression.sliding_window is 5; the policy .* cannot live with"
        ):
            fresh_model(policy, "CLA", compression=windows)
    if traits.dropout:
        fresh_model(policy, "CLA", attention_dropout=0.1)
    else:
        with pytest.raises(ValueError, match=r"attention_dropout is 0.1; it must be 0 with the policy"):
            fresh_model(policy, "CLA", attention_dropout=0.1)


@every_policy
@pytest.mark.parametrize("split", [1, 4, 11])
def test_extending_says_what_the_whole_says(policy: str, split: int) -> None:
    built, (query, key, value) = policy_config(policy).build(), _heads(16)
    traits, read = built.traits, read_by(built, query)
    whole, _ = built.keys_values(key, value, read, _context(0, 16))
    state, parts = None, []
    for start, stop in ((0, split), (split, 16)):
        now = slice(start, stop)
        reads = None if read is None else read[now]
        parts.append(built.extend(state, key[now], value[now], reads, _context(start, stop)))
        state = parts[-1].state
    close(torch.cat([part.value for part in parts]), whole.value, 1e-5)
    channels = key.shape[-1] if traits.key_bias is None else whole.key.shape[-1] - 1
    close(torch.cat([part.key for part in parts])[..., :channels], whole.key[..., :channels], 1e-5)
    if traits.key_bias is not None:
        hidden, hides = whole.key[..., -1] < HIDDEN / 2, parts[1].hides
        newest = min(split, traits.key_bias.age)
        expected = torch.zeros(traits.key_bias.age, 2, 2, dtype=torch.bool)
        expected[traits.key_bias.age - newest :] = hidden[split - newest : split]
        assert torch.equal(expected if hides is None else hides, expected)


@every_policy
def test_a_hidden_token_of_a_batch_goes_when_its_own_row_is_that_far(policy: str) -> None:
    """Rows get different numbers of tokens at a time, some none, and their slots are those of the row
    alone."""
    built, texts = model(policy, "plain"), [text(20, 1), text(20, 2)]
    paged, alone = paged_cache(built), paged_cache(built)
    sequences = [paged.open(), paged.open()]
    view, used, said = paged.rows(sequences), [0, 0], [[], []]
    for counts in ((3, 1), (1, 5), (6, 1), (2, 2), (1, 1), (7, 10)):
        new = [
            tokens[start : start + count] for tokens, start, count in zip(texts, used, counts, strict=True)
        ]
        for row, part in enumerate(logits(built, new, view)):
            said[row].append(part)
        used = [start + count for start, count in zip(used, counts, strict=True)]
    for row, tokens in enumerate(texts):
        single = alone.open()
        close(torch.cat(said[row]), logits(built, [tokens], alone.rows([single]))[0])
        for layer in range(3):
            assert torch.equal(paged.lengths(sequences[row], layer), alone.lengths(single, layer))


@every_case
def test_drafts_of_which_some_are_taken_in_leave_no_trace(policy: str, name: str) -> None:
    """Of chunks that end in wrong tokens the right ones are kept, of each row another number; logits and
    slots are those of a text without them."""
    built, texts = model(policy, name), [text(24, 1), text(24, 2)]
    expected = [parallel_logits(built, tokens) for tokens in texts]
    paged, alone = paged_cache(built), paged_cache(built)
    sequences, single = [paged.open(), paged.open()], alone.open()
    view, used = paged.rows(sequences), [5, 9]
    logits(built, [tokens[:count] for tokens, count in zip(texts, used, strict=True)], view)
    for taken, wrong in (
        ((3, 1), (2, 4)),
        ((1, 2), (0, 0)),
        ((2, 6), (9, 0)),
        ((4, 1), (1, 1)),
        ((0, 1), (3, 2)),
    ):
        undecided, free = UndecidedCache(view), paged.pages_free
        right = [
            tokens[start : start + count] for tokens, start, count in zip(texts, used, taken, strict=True)
        ]
        said = logits(
            built, [[*part, *[7] * more] for part, more in zip(right, wrong, strict=True)], undecided
        )
        assert paged.pages_free == free
        for row, (start, count) in enumerate(zip(used, taken, strict=True)):
            close(said[row][:count], expected[row][start : start + count])
        undecided.take_in(taken)
        used = [start + count for start, count in zip(used, taken, strict=True)]
    rest = [tokens[count:] for tokens, count in zip(texts, used, strict=True)]
    for row, part in enumerate(logits(built, rest, view)):
        close(part, expected[row][used[row] :])
    logits(built, [texts[0]], alone.rows([single]))
    for layer in built.model.layer_types.kv_layers:
        assert torch.equal(paged.lengths(sequences[0], layer), alone.lengths(single, layer))


@every_policy
@pytest.mark.parametrize("cut", [3, 8, 13])
def test_a_sequence_and_others_from_its_snapshot_go_on_apart(policy: str, cut: int) -> None:
    """Whatever the policy rewrites of its newest slots; the others go on with other tokens, first."""
    built, tokens, other = model(policy, "plain"), text(20, 1), [*text(20, 1)[:cut], *text(20 - cut, 2)]
    cache, alone = paged_cache(built), paged_cache(built)
    sequence = cache.open()
    logits(built, [tokens[:cut]], cache.rows([sequence]))
    snapshot = cache.keep(sequence)
    assert snapshot.fewest_tokens == (0 if policy_config(policy).traits.keeps_every_token else cut)
    for whole, begun in ((other, cache.open(snapshot)), (tokens, sequence), (tokens, cache.open(snapshot))):
        single = alone.open()
        logits(built, [whole[:cut]], alone.rows([single]))
        expected = [logits(built, [[token]], alone.rows([single]))[0] for token in whole[cut:]]
        said = [logits(built, [[token]], cache.rows([begun]))[0] for token in whole[cut:]]
        close(torch.cat(said), torch.cat(expected))
        alone.close(single)


def _heads(tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(tokens, 2, heads, 8, generator=generator) for heads in (4, 2, 2))
    key[..., -1] = 5 + 3 * key[..., -1]
    return query, key, value


def _context(start: int, stop: int) -> TokenContext:
    positions = torch.arange(start, stop)[:, None].expand(-1, 2)
    angles = rotation(positions[..., None], inverse_frequencies(8, 10000.0))
    return TokenContext(Turn(angles), positions=positions)


@every_policy
def test_what_is_said_to_be_token_wise_is(policy: str) -> None:
    """Queries always are, keys and values where the policy says so: those of the last tokens alone are the
    last ones of all."""
    built, context = policy_config(policy).build(), _context(0, 9)
    query, key, value = _heads(9)

    def last(tensor: Tensor) -> Tensor:
        return tensor[5:]

    assert torch.equal(built.query(last(query), context.at(last)), last(built.query(query, context)))
    if not built.token_wise:
        return
    read = read_by(built, query)
    whole, statistics = built.keys_values(key, value, read, context)
    assert statistics == ()
    part, _ = built.keys_values(
        last(key), last(value), None if read is None else last(read), context.at(last)
    )
    assert torch.equal(part.key, last(whole.key)) and torch.equal(part.value, last(whole.value))


def test_the_suite_sees_more_than_the_policies_of_the_package() -> None:
    assert {"dense", "forgetful"} <= {policy.partition("-")[0] for policy in POLICIES}
    assert {policy for policy, _ in CASES} == set(POLICIES) and {name for _, name in CASES} == set(MAPS)

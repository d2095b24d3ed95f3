"""The policy as a whole: limits in which it is something simpler, independence of rows, heads and
documents."""

import pytest
import torch

from lckv.attention.visibility import Visibility
from lckv.policies.base import KeyValue, TokenContext, unturned
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from tests.lckv.policies.dmc.models import attend, context, documents_of, layer

RETROFIT = DMCPolicy(DMCConfig(stage="retrofit", target_compression_ratio=4.0))
LENGTH = 30


def noise_of(tensor):
    return torch.randn(tensor.shape[:-1], generator=torch.Generator().manual_seed(5))


def run(policy, tensors, facts, visibility=None):
    """Output, keys, values and statistics."""
    query, key, value = tensors
    key_value, statistics = policy.keys_values(
        key, value, query if policy.traits.reads_query else None, facts
    )
    output = attend(policy.query(query, facts), key_value, visibility, key_bias=policy.traits.key_bias)
    return output, key_value, statistics


@pytest.mark.parametrize("exclude_self", [False, True])
def test_if_nothing_merges_it_is_plain_attention_without_the_decision_channel(exclude_self):
    query, key, value = (tensor.detach() for tensor in layer(LENGTH))
    key[..., -1] = 0
    facts, visibility = context(LENGTH, 2), Visibility(exclude_self=exclude_self)
    output, _, statistics = run(RETROFIT, (query, key, value), facts, visibility)
    assert statistics[0].count_nonzero() == 0
    query[..., -1] = 0
    # Rotation brings a part of the partner channel into the last one: that part is dropped as well.
    dense = DenseConfig().build()
    rotated, plain = dense.query(query, facts), dense.keys_values(key, value, None, facts)[0]
    rotated[..., -1] = 0
    expected = attend(rotated, plain, visibility, key_bias=None)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


def test_training_without_noise_tends_to_evaluation_as_the_temperature_falls():
    tensors = layer(LENGTH)
    cold = DMCPolicy(DMCConfig(stage="retrofit", temperature=1e-4))
    trained, _, trained_statistics = run(cold, tensors, context(LENGTH, 2, training=True))
    evaluated, _, statistics = run(cold, tensors, context(LENGTH, 2))
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained_statistics[0], statistics[0])


def test_packed_documents_are_what_they_are_alone():
    tensors = layer(LENGTH)
    noise = noise_of(tensors[1])
    lengths = [[13, 1, 16], [30]]
    documents = documents_of(lengths)
    facts = context(LENGTH, 2, training=True, noise=noise, documents=documents)
    packed, _, statistics = run(RETROFIT, tensors, facts, Visibility(documents=documents))
    merged = torch.zeros(2, 2)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            part = slice(start, start + length), slice(row, row + 1)
            alone_facts = context(length, 1, start=start, training=True, noise=noise[part])
            alone, _, counts = run(RETROFIT, [tensor[part] for tensor in tensors], alone_facts)
            torch.testing.assert_close(packed[part], alone, rtol=0, atol=2e-6)
            merged[row] += counts[0][0] * length
            start += length
    torch.testing.assert_close(statistics[0], merged / LENGTH)


def test_heads_of_a_rank_are_what_they_are_among_all():
    query, key, value = layer(LENGTH)
    noise = noise_of(key)
    output, key_value, statistics = run(
        RETROFIT, (query, key, value), context(LENGTH, 2, training=True, noise=noise)
    )
    for rank in range(2):
        mine, groups = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
        part = query[:, :, mine], key[:, :, groups], value[:, :, groups]
        facts = context(LENGTH, 2, training=True, noise=noise[:, :, groups])
        partial_output, partial_keys, partial_statistics = run(RETROFIT, part, facts)
        torch.testing.assert_close(partial_output, output[:, :, mine], rtol=0, atol=1e-6)
        torch.testing.assert_close(partial_keys.key, key_value.key[:, :, groups], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(partial_statistics[0], statistics[0][:, groups], rtol=0, atol=1e-6)


def test_padding_neither_merges_nor_counts():
    tensors = [tensor.detach() for tensor in layer(LENGTH)]
    counted = torch.ones(LENGTH, 2, dtype=torch.bool)
    counted[20:, 1] = False
    whole = run(RETROFIT, tensors, context(LENGTH, 2, counted=counted))
    short = run(RETROFIT, [tensor[:20] for tensor in tensors], context(20, 2))
    assert torch.equal(whole[2][0][1], short[2][0][1])
    torch.testing.assert_close(whole[0][:20, 1], short[0][:, 1])
    # Padding in front is not merged into by the first word.
    counted = torch.ones(LENGTH, 2, dtype=torch.bool)
    counted[:3] = False
    padded = run(RETROFIT, tensors, context(LENGTH, 2, counted=counted))[1]
    assert torch.equal(padded.value[:4], tensors[2][:4])


@pytest.mark.parametrize("exclude_self", [False, True])
def test_readers_of_shared_keys_see_what_the_dense_oracle_sees(exclude_self):
    tensors, other = layer(LENGTH), layer(LENGTH, group=4)[0]
    facts = context(LENGTH, 2, training=True, noise=noise_of(tensors[1]))
    key_value, _ = RETROFIT.keys_values(*tensors[1:], tensors[0], facts)
    query, visibility = RETROFIT.query(other, facts), Visibility(exclude_self=exclude_self)
    outputs = [attend(query, key_value, visibility, plain=plain) for plain in (False, True)]
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)
    leaves = [*tensors, other]
    gradients = [torch.autograd.grad((output**2).sum(), leaves, retain_graph=True) for output in outputs]
    for actual, right in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=2e-5 * max(1.0, float(right.abs().max())))
        assert actual.count_nonzero() > 0


def test_half_precision_keeps_its_dtype_and_stays_finite():
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in layer(LENGTH)]
    for training in (False, True):
        output, key_value, statistics = run(RETROFIT, tensors, context(LENGTH, 2, training=training))
        assert output.dtype == key_value.key.dtype == key_value.value.dtype == torch.bfloat16
        assert statistics[0].dtype == torch.float32
        gradients = torch.autograd.grad(output.float().sum() + statistics[0].sum(), tensors)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_zero_out_ends_where_the_others_start():
    policy = DMCPolicy(DMCConfig(stage="zero_out"))
    assert policy.traits.keeps_every_token
    assert not policy.traits.reads_query
    assert policy.draw_noise((3, 1, 2), [1], torch.device("cpu")) is None
    assert policy.auxiliary_loss([], 0.9) is None
    query, key, value = (tensor.detach() for tensor in layer(LENGTH))
    ended = context(LENGTH, 2, progress=0.8)
    faded = run(policy, (query, key, value), ended)[0]
    key[..., -1] = query[..., -1] = 0
    torch.testing.assert_close(
        faded, run(RETROFIT, (query, key, value), context(LENGTH, 2))[0], rtol=0, atol=2e-6
    )


def test_loss_and_target():
    rate = torch.tensor([0.0, 0.5])
    assert RETROFIT.target(0.5) == 2.5
    assert RETROFIT.auxiliary_loss([rate], 1.0).tolist() == [0.75, 0.25]
    assert RETROFIT.auxiliary_loss([rate], 0.0).tolist() == [0.0, 0.0]
    weighted = DMCPolicy(DMCConfig(stage="finetune", target_compression_ratio=2.0, loss_weight=3.0))
    assert weighted.auxiliary_loss([rate], 0.0).tolist() == [1.5, 0.0]
    per_rank = weighted.auxiliary_loss([torch.tensor([[0.0, 1.0], [0.25, 0.25]])], 0.0)
    assert per_rank.tolist() == [0.75, 0.75]


def test_noise_of_the_policy():
    noise = RETROFIT.draw_noise((4, 2, 3), [1, 2], torch.device("cpu"))
    assert noise.shape == (4, 2, 3)
    assert noise.dtype == torch.float32


def test_inputs_are_left_alone():
    tensors = layer(LENGTH)
    before = [tensor.detach().clone() for tensor in tensors]
    unrotated = TokenContext(unturned)
    output, key_value, _ = run(RETROFIT, tensors, unrotated)
    assert isinstance(key_value, KeyValue)
    output.sum().backward()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))

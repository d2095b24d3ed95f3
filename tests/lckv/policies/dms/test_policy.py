"""The policy against the plain formula with a matrix of L x L: documents, padding, stages."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lckv.attention import sdpa
from lckv.attention.visibility import Documents, Visibility
from lckv.policies.base import TokenContext
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dms import eviction
from lckv.policies.dms.config import DMSConfig
from lckv.policies.dms.policy import DMSPolicy
from lckv.rope import Turn, inverse_frequencies, rotation

LENGTH, ROWS, GROUPS, HEADS, CHANNELS, WINDOW = 24, 2, 2, 6, 8, 3
POLICY = DMSPolicy(
    DMSConfig(
        stage="finetune",
        decision_scale=4.0,
        initial_decision_offset=0.5,
        temperature=0.5,
        window=WINDOW,
        target_compression_ratio=2.0,
    )
)


def drawn() -> list[Tensor]:
    """Queries, keys and values, float64 leaves."""
    random = torch.Generator().manual_seed(5)
    shapes = [(LENGTH, ROWS, heads, CHANNELS) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]


def context(**facts: object) -> TokenContext:
    positions = torch.arange(LENGTH)[:, None].expand(-1, ROWS)
    angles = rotation(positions[..., None], inverse_frequencies(CHANNELS, 10000.0))
    return TokenContext(Turn(angles), positions=positions, **facts)  # type: ignore[arg-type]


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, facts: TokenContext, document: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [s, b, h, d] and the share of drops [b, g]; `document` [s, b]: which one a token is in."""
    config = POLICY.config
    borrowed = torch.zeros(HEADS, CHANNELS, dtype=torch.bool)
    borrowed[:: HEADS // GROUPS, -1] = True
    x = config.decision_scale * query[:, :, :: HEADS // GROUPS, -1] - config.initial_decision_offset
    z = (x + facts.noise) / config.temperature
    rotated = facts.rotate(query.masked_fill(borrowed, 0.0)).masked_fill(borrowed, 0.0)
    turned = facts.rotate(key)
    scores = torch.einsum("tbgnd,sbgd->bgnts", rotated.unflatten(2, (GROUPS, -1)), turned) / CHANNELS**0.5
    about = torch.cat((torch.log(1 - torch.sigmoid(z))[1:], torch.zeros_like(z[:1])))  # of s by s + 1
    age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    scores = scores + about.permute(1, 2, 0)[:, :, None, None] * (age > WINDOW)
    seen = (age >= 0) & (document.T[:, :, None] == document.T[:, None])
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    output = torch.einsum("bgnts,sbgd->tbgnd", weights, value).flatten(2, 3)
    soft = torch.sigmoid(z)
    return output, ((soft > 0.5).double() + soft - soft.detach()).mean(0)


@pytest.mark.parametrize("split", [False, True], ids=["whole rows", "documents"])
def test_training_is_the_formula(split: bool) -> None:
    leaves = drawn()
    noise = POLICY.draw_noise((LENGTH, ROWS, GROUPS), [1, 2], torch.device("cpu"))
    facts = context(training=True, noise=noise)
    bounds = (0, 9, 10, LENGTH, LENGTH + 16, 2 * LENGTH) if split else (0, LENGTH, 2 * LENGTH)
    documents = Documents.at(bounds, "cpu") if split else None
    facts = replace(facts, documents=documents)
    numbers = torch.arange(2 * LENGTH)[:, None].ge(torch.tensor(bounds[:-1])).sum(1)
    document = numbers.view(ROWS, LENGTH).T
    key_value, (rate,) = POLICY.keys_values(leaves[1], leaves[2], leaves[0], facts)
    query = POLICY.query(leaves[0], facts, GROUPS)
    output = sdpa.attend(
        *(part.permute(1, 2, 0, 3) for part in (query, *key_value)),
        Visibility(documents=documents),
        scale=CHANNELS**-0.5,
        key_bias=POLICY.traits.key_bias,
    ).permute(2, 0, 1, 3)
    expected, share = by_formula(*leaves, facts, document)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(rate, share.float(), rtol=0, atol=1e-6, check_dtype=False)
    random = torch.Generator().manual_seed(6)
    weights = torch.randn(output.shape, generator=random, dtype=torch.float64)
    ours = torch.autograd.grad((output * weights).sum() + rate.sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum() + share.sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_padding_decides_nothing_and_nothing_is_decided_about_it() -> None:
    logits = torch.tensor([[1.0, 1, -1, 1, 1, 1, -1, 1]]).T[..., None]
    counted = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0]]).T.bool()
    hidden = eviction.hard_bias(logits, context(counted=counted)) < 0
    # token 2, behind 1, keeps it; 5 is the next one behind 2 and drops it; 6 keeps 5; none is behind 6
    assert hidden.flatten().tolist()[1:7] == [False, True, True, True, False, False]
    hides, state = eviction.advance(torch.zeros(3, 1, 1, 1), logits, counted)
    assert not hides.any()
    assert state.flatten().tolist() == [1.0, 2.0, 1.0][-3:]
    rate = DMSPolicy(replace(POLICY.config, decision_scale=1.0, initial_decision_offset=0.0))
    says = torch.zeros(8, 1, 1, CHANNELS)
    says[..., -1] = logits[..., 0][..., None]
    positions = torch.arange(8)[:, None]
    angles = rotation(positions[..., None], inverse_frequencies(CHANNELS, 10000.0))
    facts = TokenContext(Turn(angles), counted=counted, positions=positions)
    assert rate.keys_values(says, says, says, facts)[1][0].item() == 0.5


def test_the_first_token_of_a_document_decides_about_none() -> None:
    logits = torch.ones(6, 1, 1)
    facts = TokenContext(Turn(rotation(torch.zeros(6, 1, 1), inverse_frequencies(4, 1e4))))
    facts = replace(facts, documents=Documents.at((0, 3, 6), "cpu"))
    assert (eviction.hard_bias(logits, facts) < 0).flatten().tolist() == [True, True, False] * 2


def test_a_cache_keeps_the_last_token_of_a_document() -> None:
    """Also where that one is still among the newest W + 1 when the next tokens come."""
    says = torch.ones(6, 1, 1, CHANNELS)  # every decision is to drop
    facts = TokenContext(Turn(rotation(torch.zeros(6, 1, 1), inverse_frequencies(CHANNELS, 1e4))))
    drops = DMSPolicy(replace(POLICY.config, decision_scale=1.0, initial_decision_offset=0.5))
    packed = drops.extend(None, says, says, says, replace(facts, documents=Documents.at((0, 4, 6), "cpu")))
    following = drops.extend(packed.state, says, says, says, facts)
    # Tokens 2 .. 5, of which 3 is the last of its document.
    assert following.hides is not None
    assert following.hides.flatten().tolist() == [True, False, True, True]


def test_logits_that_are_not_finite_are_seen() -> None:
    query, key, value = (tensor.detach().clone() for tensor in drawn())
    query[3, 1, 3, -1] = torch.nan
    (rate,) = POLICY.keys_values(key, value, query, context())[1]
    assert rate.isnan().tolist() == [[False, False], [False, True]]


def test_stage_zero_out_fades_the_borrowed_channel_alone() -> None:
    policy, dense = DMSPolicy(DMSConfig()), DenseConfig().build()
    query, key, value = drawn()
    begin, half, end = (context(progress=progress, training=True) for progress in (0.0, 0.4, 0.9))
    assert torch.equal(policy.query(query, begin, GROUPS), dense.query(query, begin))
    assert torch.equal(
        policy.keys_values(key, value, None, half)[0].key, dense.keys_values(key, value, None, half)[0].key
    )
    faded = policy.query(query, half, GROUPS)
    borrowed = slice(None, None, HEADS // GROUPS)
    others = [head for head in range(HEADS) if head % (HEADS // GROUPS)]
    assert torch.equal(faded[:, :, others], dense.query(query, half)[:, :, others])
    plain = query.clone()
    plain[:, :, borrowed, -1] *= 0.5
    expected = half.rotate(plain)[:, :, borrowed]
    torch.testing.assert_close(faded[:, :, borrowed, :-1], expected[..., :-1])
    torch.testing.assert_close(faded[:, :, borrowed, -1], expected[..., -1] * 0.5)
    ended = policy.query(query, end, GROUPS)
    assert torch.equal(ended, POLICY.query(query, end, GROUPS)[..., :CHANNELS])
    assert torch.equal(policy.query(query, half), dense.query(query, half)), (
        "a layer that reads lends nothing"
    )
    assert policy.auxiliary_loss([], 0.5) is None and policy.report([], 0.0, 0.5) == {}
    assert policy.draw_noise((3, 1, 2), [1], torch.device("cpu")) is None


def test_the_end_of_stage_zero_out() -> None:
    weight = torch.randn(HEADS, CHANNELS, 5)

    def rows(kind: str, channel: int):
        assert kind == "first query"
        yield from weight[:: HEADS // GROUPS, channel]

    before = weight.clone()
    retrofit = DMSPolicy(DMSConfig(stage="retrofit"))
    assert "Run stage zero_out first" in str(retrofit.obstacle_in_weights(rows, DenseConfig()))
    assert retrofit.obstacle_in_weights(rows, POLICY.config) is None
    assert DMSPolicy(DMSConfig()).end_stage(rows) == (
        "stage zero_out is over: the borrowed channel of the first query head of each group is 0"
    )
    assert retrofit.obstacle_in_weights(rows, DenseConfig()) is None
    assert retrofit.end_stage(rows) is None
    assert (weight != before).any(-1).nonzero().tolist() == [[0, CHANNELS - 1], [3, CHANNELS - 1]]

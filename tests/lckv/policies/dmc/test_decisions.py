"""Decisions, what forces them, what they hide, and how they are counted."""

import math

import pytest
import torch

from lckv.attention.visibility import Documents
from lckv.policies.base import TokenContext, unturned
from lckv.policies.binary_decisions import decision_rate as merge_rate
from lckv.policies.binary_decisions import draw_noise, straight_through
from lckv.policies.dmc.decisions import (
    HIDDEN,
    decision_logits,
    forced_openings,
    hard_decisions,
    importance,
    soft_decisions,
)
from lckv.policies.stages import hinge_loss

SHAPE = 6, 2, 3


def facts(documents=None, counted=None):
    return TokenContext(unturned, documents=documents, counted=counted)


def test_logits_and_weights_come_from_the_last_channel_in_float32():
    key = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    key[..., -1] = torch.tensor([7.0, 1.0])
    assert decision_logits(key, 5.0).tolist() == [[[2.0, -4.0]]]
    query = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)
    query[..., -1] = torch.tensor([1.0, 3.0, -8.0, -2.0])
    expected = torch.sigmoid(torch.tensor([2.0 + 5.0, -5.0 + 5.0])) + 0.25
    torch.testing.assert_close(importance(query, 2, 5.0, 0.25)[0, 0], expected)


def test_first_tokens_padding_and_what_follows_it_open_slots():
    logits = torch.full(SHAPE, 9.0)
    assert forced_openings(logits, facts()).nonzero().tolist() == [[0, 0], [0, 1]]
    documents = Documents(torch.tensor([0, 4, 6, 12], dtype=torch.int32))
    assert forced_openings(logits, facts(documents)).nonzero().tolist() == [[0, 0], [0, 1], [4, 0]]
    counted = torch.ones(6, 2, dtype=torch.bool)
    counted[2, 1] = False
    assert forced_openings(logits, facts(counted=counted)).nonzero().tolist() == [
        [0, 0],
        [0, 1],
        [2, 1],
        [3, 1],
    ]


def test_hard_decisions_hide_what_is_merged_next():
    logits = torch.tensor([9.0, 1.0, -1.0, 2.0])[:, None, None]
    merge, bias = hard_decisions(logits, forced_openings(logits, facts()))
    assert merge.flatten().tolist() == [0, 1, 0, 1]
    assert bias.flatten().tolist() == [HIDDEN, 0, HIDDEN, 0]


def test_soft_decisions_and_their_bias():
    logits = torch.tensor([9.0, 1.0, -1.0, 2.0])[:, None, None]
    noise = torch.tensor([0.0, 0.5, 0.25, 0.0])[:, None, None]
    merge, bias = soft_decisions(logits, forced_openings(logits, facts()), noise, 0.5)
    expected = torch.sigmoid(torch.tensor([-math.inf, 3.0, -1.5, 4.0]))
    torch.testing.assert_close(merge.flatten(), expected)
    torch.testing.assert_close(bias.flatten()[:3], torch.log(1 - expected[1:]))
    assert bias[3] == 0


def test_soft_decisions_stay_finite_at_the_extremes():
    logits = torch.tensor([0.0, 1e8, -1e8, 1e30, 5.0])[:, None, None].requires_grad_()
    opens = torch.tensor([True, False, False, False, True])[:, None]
    merge, bias = soft_decisions(logits, opens, None, 0.1)
    assert bias.min() == HIDDEN
    (gradient,) = torch.autograd.grad((merge + bias).sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[[0, 4]].count_nonzero() == 0


def test_rounding_is_straight_through():
    merge = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0], requires_grad=True)
    decided = straight_through(merge)
    assert decided.tolist() == [0, 0, 0, 1, 1]
    (gradient,) = torch.autograd.grad((decided * torch.arange(5.0)).sum(), merge)
    assert gradient.tolist() == [0, 1, 2, 3, 4]


def test_padding_is_not_counted():
    merge = torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None, None].expand(4, 2, 3)
    counted = torch.tensor([[True, True, True, False], [False] * 4]).T
    rate = merge_rate(merge, torch.zeros(4, 2, 3), facts(counted=counted))
    torch.testing.assert_close(rate, torch.tensor([[2 / 3] * 3, [0.0] * 3]))
    assert torch.equal(merge_rate(merge, torch.zeros(4, 2, 3), facts()), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 3])
def test_a_logit_that_is_not_finite_is_found_where_it_is(wrong, token):
    logits = torch.zeros(SHAPE)
    logits[token, 1, 2] = wrong
    opens = forced_openings(logits, facts())
    for merge, _ in (soft_decisions(logits, opens, None, 0.1), hard_decisions(logits, opens)):
        rate = merge_rate(merge, logits, facts())
        assert (~rate.isfinite()).nonzero().tolist() == [[1, 2]]


def test_noise_depends_on_the_seed_of_its_row_only():
    cpu = torch.device("cpu")
    noise = draw_noise((50, 3, 4), [11, 12, 13], cpu)
    assert torch.equal(noise[:, 1:], draw_noise((50, 2, 4), [12, 13], cpu))
    assert not torch.equal(noise[:, 0], noise[:, 1])
    state = torch.get_rng_state()
    assert torch.equal(noise, draw_noise((50, 3, 4), [11, 12, 13], cpu))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        draw_noise((50, 3, 4), [11, 12], cpu)


def test_noise_is_the_difference_of_two_gumbels():
    noise = draw_noise((20000, 1, 4), [3], torch.device("cpu")).flatten()
    assert noise.isfinite().all()
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.var()) == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert float((noise < math.log(3)).float().mean()) == pytest.approx(0.75, abs=0.005)


def test_the_loss_is_one_sided_and_per_row():
    assert hinge_loss(torch.tensor([0.0, 0.5, 0.75, 0.9]), 4.0).tolist() == pytest.approx(
        [0.75, 0.25, 0.0, 0.0]
    )

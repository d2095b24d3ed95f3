"""What a policy makes of parts of rows is what it makes of whole rows, if its settings state its reach."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.policies.base import KVPolicy, RowPart, TokenContext
from lckv.policies.config import PolicyConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.rope import inverse_frequencies, rotate, rotation
from tests.lckv.policies.cases import POLICIES, policy_config, read_by

TOKENS, ROWS, GROUPS, HEADS, CHANNELS = 24, 2, 2, 4, 8
MERGING = DMCConfig(stage="retrofit", initial_decision_bias=0.3, temperature=0.5, window=4)
CONFIGS: dict[str, PolicyConfig] = {
    **{name: policy_config(name) for name in POLICIES if policy_config(name).traits.reach is not None},
    "dmc, fading": replace(MERGING, stage="zero_out"),
    "dmc, window of 4": MERGING,
    "dmc, window of 1": replace(MERGING, window=1),
    "dmc without window": replace(MERGING, window=None),
}
BEGINS = (0, 7, 8, 18, TOKENS, TOKENS + 12, 2 * TOKENS)
"""Of the documents of both rows; parts begin at 6, 12 and 18."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_the_whole(name: str, training: bool) -> None:
    policy = CONFIGS[name].build()
    heads = [key, value, query] = drawn()
    read = read_by(policy, query)
    noise = policy.draw_noise((TOKENS, ROWS, GROUPS), [3, 4], torch.device("cpu")) if training else None
    counted = torch.ones(TOKENS, ROWS, dtype=torch.bool)
    counted[20:, 1] = False
    whole = context_at(positions(), counted=counted, noise=noise, training=training)
    whole = replace(whole, documents=Documents.at(BEGINS, "cpu"))
    expected = policy.keys_values(key, value, read, whole)
    found = in_parts(policy, key, value, read, whole)
    for ours, theirs in zip(found, (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [gradients_of(result, heads) for result in (found, [*expected[0], *expected[1]])]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def drawn() -> list[Tensor]:
    """Keys, values and queries."""
    random = torch.Generator().manual_seed(1)
    shapes = [(TOKENS, ROWS, heads, CHANNELS) for heads in (GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]


def positions() -> Tensor:
    return torch.arange(TOKENS)[:, None].expand(-1, ROWS)


def context_at(places: Tensor, **facts: object) -> TokenContext:
    angles = rotation(places[:, :, None], inverse_frequencies(CHANNELS, 10000.0))
    return TokenContext(partial(rotate, angles=angles), positions=places, **facts)  # type: ignore[arg-type]


def in_parts(
    policy: KVPolicy, key: Tensor, value: Tensor, query: Tensor | None, whole: TokenContext
) -> list[Tensor]:
    """Keys, values and statistics, of four parts of each row that are put together again."""
    reach = policy.traits.reach
    assert reach is not None

    def rows(tensor: Tensor, outside: float = 0) -> Tensor:
        """[s, b, ...] to [before + c + after, 4 b, ...], part after part."""
        ends = [tensor.new_full((n, *tensor.shape[1:]), outside) for n in (reach.before, reach.after)]
        padded, length = torch.cat((ends[0], tensor, ends[1])), TOKENS // 4
        around = length + reach.before + reach.after
        return torch.cat([padded[start : start + around] for start in range(0, TOKENS, length)], 1)

    def carried(product: Tensor, last: Tensor) -> Tensor:
        sums, into = torch.zeros_like(last[:ROWS]), []
        for factor, end in zip(product.split(ROWS), last.split(ROWS), strict=True):
            into.append(sums)
            sums = end + factor[..., None] * sums
        return torch.cat(into)

    counted = whole.counted
    assert counted is not None
    begins = whole.begins(TOKENS, ROWS, key.device).clone()
    begins[20:, 1] = True  # padding, and what follows it
    part = RowPart(reach, rows(begins, True), counted.sum(0).float().repeat(4), carried)
    facts = {"counted": rows(counted, True), "training": whole.training, "part": part}
    noise = None if whole.noise is None else rows(whole.noise)
    context = context_at(rows(positions()), noise=noise, **facts)
    read = None if query is None else rows(query)
    key_value, statistics = policy.keys_values(rows(key), rows(value), read, context)
    # [c, 4 b, ...] to [4 c, b, ...]
    together = [torch.cat(reach.own(tensor).split(ROWS, 1)) for tensor in key_value]
    return [*together, *(value.unflatten(0, (4, ROWS)).sum(0) for value in statistics)]


def gradients_of(results: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum with weights."""
    random = torch.Generator().manual_seed(2)
    results = [result for result in results if result.requires_grad]
    weights = [torch.randn(result.shape, generator=random) for result in results]
    return torch.autograd.grad(results, leaves, weights, materialize_grads=True, allow_unused=True)

"""Shared projections: what leaves attention unchanged does, in float64; copies of one layer in another basis
are recovered, which their mean is not; and the fit is the best of its rank, by the textbook's formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lckv.rope import RotaryEmbedding, rotate
from lckv.sharing import low_rank
from lckv.sharing.low_rank import (
    Reader,
    as_channels,
    as_pairs,
    fit,
    mixed_outputs,
    refitted_outputs,
    turned_queries,
)

TOKENS, INPUTS, HIDDEN = 40, 12, 9


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def drawn_factors(*shape: int, seed: int = 0) -> Tensor:
    return torch.complex(drawn(*shape, seed=seed), drawn(*shape, seed=seed + 1))


def divided(keys: Tensor, factors: Tensor) -> Tensor:
    """Key weights [g, D, e], every pair divided by its factor [g, D / 2]."""
    return as_channels(as_pairs(keys) / factors[..., None])


def attention(x: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """[T, h] of x [T, e]; weights as in `Reader`, float64."""
    turn = RotaryEmbedding(key.shape[1], 1e4, None, 64).rotation(torch.arange(len(x))[:, None, None])
    q = rotate(torch.einsum("te,gade->tgad", x, query), turn)
    k = rotate(torch.einsum("te,gde->tgd", x, key)[:, :, None], turn)[:, :, 0]
    scores = torch.einsum("tgad,sgd->gats", q, k) / key.shape[1] ** 0.5
    later = torch.ones(len(x), len(x)).triu(1).bool()
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("gats,se,gde,hgad->th", weights, x, value, output)


@given(groups=st.integers(1, 4), queries=st.integers(1, 4), half=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_another_basis_leaves_attention_unchanged(groups: int, queries: int, half: int, seed: int) -> None:
    channels = 2 * half
    x = drawn(7, INPUTS, seed=seed)
    query, output = drawn(groups, queries, channels, INPUTS), drawn(HIDDEN, groups, queries, channels, seed=1)
    key, value = drawn(groups, channels, INPUTS, seed=2), drawn(groups, channels, INPUTS, seed=3)
    factors = drawn_factors(groups, half, seed=seed)
    mixes = drawn(groups, channels, channels, seed=seed) + 4 * torch.eye(channels, dtype=x.dtype)
    shared_key = divided(key, factors)
    shared_value = torch.linalg.solve(mixes.mT, value)  # value = mixes^T shared
    expected = attention(x, query, key, value, output)
    result = attention(
        x, turned_queries(query, factors), shared_key, shared_value, mixed_outputs(output, mixes)
    )
    assert (result - expected).abs().max() <= 1e-10 * expected.abs().max().clamp_min(1)
    assert (attention(x, query, shared_key, value, output) - expected).abs().max() > 1e-6


def reader(x: Tensor, key: Tensor, value: Tensor, seed: int = 0) -> Reader:
    groups, channels, _ = key.shape
    output = drawn(HIDDEN, groups, channels, seed=seed + 50)
    return Reader(
        torch.einsum("te,gde->tgd", x, key),
        torch.einsum("te,gde->tgd", x, value),
        key,
        value,
        drawn(groups, channels // 2, seed=seed + 60).square(),
        torch.einsum("hgd,hgc->gdc", output, output),
    )


def own_of(shared: low_rank.SharedProjections, number: int) -> tuple[Tensor, Tensor]:
    """Key and value weights of a reader, as far as the shared ones restore them."""
    pairs = as_pairs(shared.key_weight) * shared.factors[number][..., None]
    return as_channels(pairs), shared.mixes[number].mT @ shared.value_weight


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_copies_in_other_bases_are_recovered(groups: int) -> None:
    x, channels = drawn(TOKENS, INPUTS), 4
    key, value = drawn(groups, channels, INPUTS, seed=2), drawn(groups, channels, INPUTS, seed=3)
    keys = [divided(key, drawn_factors(groups, channels // 2, seed=10 * number)) for number in range(3)]
    values = [drawn(groups, channels, channels, seed=number) @ value for number in range(3)]
    readers = [
        reader(x, *weights, seed=number) for number, weights in enumerate(zip(keys, values, strict=True))
    ]
    shared = fit(x, readers)
    for number, (of_key, of_value) in enumerate(zip(keys, values, strict=True)):
        restored = own_of(shared, number)
        torch.testing.assert_close(restored[0], of_key, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(restored[1], of_value, atol=1e-6, rtol=1e-6)
        assert (torch.stack(keys).mean(0) - of_key).abs().max() > 0.1


def test_the_fit_is_the_best_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted values of least squares, cut off by numpy's SVD; of keys by a complex one for each pair."""
    monkeypatch.setattr(low_rank, "RIDGE", 1e-13)
    x, channels = drawn(TOKENS, INPUTS), 4
    weights = drawn(1, channels, INPUTS, seed=7), drawn(1, channels, INPUTS)
    readers = [reader(drawn(TOKENS, INPUTS, seed=number), *weights, number) for number in range(3)]
    shared = fit(x, readers)
    restored = [own_of(shared, number) for number in range(3)]

    def best(targets: list[Tensor], rank: int) -> np.ndarray:
        stacked = torch.cat(targets, 1).numpy()
        fitted = x.numpy() @ np.linalg.lstsq(x.numpy(), stacked)[0]
        u, s, v = np.linalg.svd(fitted, full_matrices=False)
        return u[:, :rank] * s[:rank] @ v[:rank]

    roots = [torch.linalg.cholesky(one.output_gram[0]) for one in readers]
    expected = best([one.value[:, 0] @ root for one, root in zip(readers, roots, strict=True)], channels)
    result = [x @ value[0].T @ root for (_, value), root in zip(restored, roots, strict=True)]
    np.testing.assert_allclose(torch.cat(result, 1).numpy(), expected, atol=1e-5)
    for pair in range(channels // 2):

        def numbers(key: Tensor, one: Reader, pair: int = pair) -> Tensor:
            weight = one.query_energy[0, pair].sqrt()
            return torch.complex(key[:, pair], key[:, pair + channels // 2])[:, None] * weight

        expected = best([numbers(one.key[:, 0], one) for one in readers], 1)
        keys = [numbers(x @ key[0].T, one) for one, (key, _) in zip(readers, restored, strict=True)]
        np.testing.assert_allclose(torch.cat(keys, 1).numpy(), expected, atol=1e-6)


def test_readers_without_any_use_of_keys_and_values_do_no_harm() -> None:
    x = drawn(TOKENS, INPUTS)
    one = reader(x, drawn(2, 4, INPUTS, seed=2), drawn(2, 4, INPUTS, seed=3))
    silent = replace(one, query_energy=torch.zeros(2, 2), output_gram=torch.zeros(2, 4, 4))
    for readers in ([silent, silent], [one, silent], [one]):
        shared = fit(x, readers)
        assert all(part.isfinite().all() for part in shared)
        torch.testing.assert_close(own_of(shared, 0)[0], one.key_weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(own_of(shared, 0)[1], one.value_weight, atol=1e-6, rtol=1e-6)


def test_outputs_are_those_of_ridge_regression() -> None:
    heads, wanted, weight = drawn(TOKENS, 6), drawn(TOKENS, HIDDEN, seed=1), drawn(HIDDEN, 6, seed=2)
    result = refitted_outputs(weight, heads.T @ heads, heads.T @ (wanted - heads @ weight.T), 0.5)
    penalty = (0.5 * heads.square().sum(0).mean()).sqrt() * torch.eye(6, dtype=heads.dtype)
    left = torch.cat([heads, penalty]).numpy()  # the penalty as rows of their own
    right = torch.cat([wanted, penalty @ weight.T]).numpy()
    np.testing.assert_allclose(result.T.numpy(), np.linalg.lstsq(left, right)[0], atol=1e-10)
    same = refitted_outputs(weight, heads.T @ heads, torch.zeros(6, HIDDEN, dtype=heads.dtype), 0.5)
    assert torch.equal(same, weight)

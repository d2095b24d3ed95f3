"""Attention to keys that come chunk by chunk: all ranks in one process, against the score matrix."""

import pytest
import torch
from torch import Tensor

from lckv.attention import reference
from lckv.attention.arriving import ChunkSight, add_gradients_before_arrivals, before_arrivals
from lckv.attention.aten_pairs import AtenCPU
from lckv.attention.flash3 import FlashAttn3Pair
from lckv.attention.flash_attn_pair import FlashAttnPair
from lckv.attention.flash_pair import FlashPair
from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.attention.sequences import Layout
from lckv.attention.visibility import Documents, Visibility
from tests.lckv.attention.stand_ins import FlashAttnInterfaceStandIn, flash_attn_3
from tests.lckv.attention.test_biased import documents_of, tensors

ROWS, CHUNK, CHANNELS = 2, 3, 8
PAIRS = {
    "aten": AtenCPU(),
    "flash-attn": FlashAttnPair(FlashAttnInterfaceStandIn()),
    "flash-attn 3": FlashAttn3Pair(flash_attn_3()),
}
AS_FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
"""The score matrix is float32."""
CUTS = {
    "whole rows": None,
    "rows": [],
    "at the ends of chunks": [3, 9, 12, 24, 27],
    "across chunks": [1, 2, 10, 20, 40],
    "of a token each": range(48),
}


def owned(ranks: int) -> list[tuple[int, int]]:
    return [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", ["plain", "exclude self", "biased", "biased beside values"])
def test_the_ranks_together_attend_as_to_whole_rows(ranks: int, cuts: str, kind: str) -> None:
    pair = PAIRS["flash-attn" if ranks == 2 else "aten"]
    extra, length = 8 * (kind == "biased beside values"), 2 * ranks * CHUNK
    documents = None if CUTS[cuts] is None else documents_of(ROWS, length, CUTS[cuts])
    key_bias = KeyBias(1, extra) if "biased" in kind else None
    biases = (-9.0, 0.0, HIDDEN) if key_bias else (-1.0, 1.0)
    inputs = tensors(ROWS, 2, 2, length, CHANNELS, biases=biases, extra=extra)
    exclude_self = kind == "exclude self"
    visibility = Visibility(exclude_self=exclude_self, documents=documents)
    expected = reference.attend(*inputs, visibility, scale=0.3, key_bias=key_bias)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    of_inputs = torch.autograd.grad(expected, inputs, gradient)

    sums = [torch.zeros_like(tensor) for tensor in inputs]
    for own in owned(ranks):
        sight = ChunkSight(own, 2 * ranks, ROWS, CHUNK, exclude_self, key_bias is not None, documents)
        place = torch.cat([torch.arange(n * CHUNK, (n + 1) * CHUNK) for n in own])
        output = round_and_back(sight, owned(ranks), inputs, gradient, sums, pair)
        torch.testing.assert_close(output, expected[:, :, place], **AS_FLOAT32)
    for total, wanted in zip(sums, of_inputs, strict=True):
        torch.testing.assert_close(total, wanted, **AS_FLOAT32)


def round_and_back(
    sight: ChunkSight,
    everyone: list[tuple[int, int]],
    inputs: list[Tensor],
    gradient: Tensor,
    sums: list[Tensor],
    pair: FlashPair,
) -> Tensor:
    """The output of the rank that has `sight`; adds to the gradients of whole rows."""
    places = [torch.cat([torch.arange(n * CHUNK, (n + 1) * CHUNK) for n in own]) for own in everyone]
    mine = everyone.index(sight.own)
    order = [mine, *(rank for rank in range(len(everyone)) if rank != mine)]
    query, key, value = (tensor.detach()[:, :, places[mine]] for tensor in inputs)
    output = query.new_empty(*query.shape[:-1], CHANNELS)
    whole = before_arrivals(query, key, value, output, biased=sight.biased, scale=0.3)
    arrivals = list(sight.arrivals([everyone[rank] for rank in order[1:]], pair, 0.3))
    keys_values = [[tensor.detach()[:, :, places[rank]] for tensor in inputs[1:]] for rank in order]
    rests = [arrival.join(whole, query, *parts) for arrival, parts in zip(arrivals, keys_values, strict=True)]
    gradient = gradient[:, :, places[mine]]
    for number, (arrival, rest, parts) in enumerate(zip(arrivals, rests, keys_values, strict=True)):
        own = [torch.zeros_like(tensor) for tensor in (query, *parts)]
        arrival.add_gradients(gradient, query, *parts, whole, rest, own)
        if sight.biased and number == 0:
            add_gradients_before_arrivals(gradient, query, *parts, whole, 0.3, own)
        for total, part, rank in zip(sums, own, (mine, order[number], order[number]), strict=True):
            total.index_add_(2, places[rank], part)
    return whole.output


def test_without_documents_a_part_is_one_rectangle() -> None:
    """So that a kernel is called once for each part."""
    for own in owned(4):
        sight = ChunkSight(own, total=8, rows=1, chunk=5)
        assert sight.own_layout() == Layout(slice(0, 10), slice(0, 10), None, ())
        for keys in owned(4):
            if keys != own:
                (piece,) = sight.rectangles(keys)
                queries, seen = (part.stop - part.start for part in (piece.queries, piece.keys))
                assert (queries, seen) in [(10, 5), (5, 10)]


def test_nothing_is_computed_of_parts_that_no_document_reaches() -> None:
    documents = Documents.at((0, 10, 20, 30, 40), "cpu")
    first, second = (ChunkSight(own, 4, rows=1, chunk=10, documents=documents) for own in owned(2))
    assert first.rectangles((1, 2)) == second.rectangles((0, 3)) == []
    sequences = first.own_layout().sequences
    assert sequences is not None
    assert sequences.bounds.tolist() == [0, 10, 20]

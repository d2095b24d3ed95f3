"""Attention of the last tokens of a row to all of them: every backend against the oracle, and chunks of
queries one after the other against the whole, which is context parallelism."""

import inspect
import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lckv.attention import flash, flash3, reference, sdpa
from lckv.attention.aten_pairs import AtenEfficient, AtenFlash
from lckv.attention.biased import attend_biased
from lckv.attention.flash_pair import FlashPair
from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.attention.last_queries import attend_last
from lckv.attention.visibility import Documents, Visibility
from lckv.errors import UnsupportedError
from tests.lckv.attention.stand_ins import CudaStandIn, flash_attn, flash_attn_3

BACKENDS: dict[str, Any] = {
    "sdpa": sdpa.attend,
    "flash": partial(flash.attend, kernel=flash_attn()),
    "flash3": partial(flash3.attend, kernel=flash_attn_3()),
}
LENGTH = 20
ROWS = 2
# With 8 queries: a document that crosses to them, one that starts with them, and all of one row as one.
DOCUMENTS = {
    "none": None,
    "crossing": Documents.at([0, 6, 20, 26, 29, 40], "cpu"),
    "one starts there": Documents.at([0, 5, 12, 20, 35, 36, 38, 40], "cpu"),
    "rows": Documents.at([0, 20, 40], "cpu"),
    "a row": Documents.at([0, 20, 30, 40], "cpu"),
}
WAYS = {
    "whole": (None, None),
    "window of nothing but itself": (1, None),
    "small window": (3, None),
    "window longer than the queries": (11, None),
    "window longer than the keys": (30, None),
    "frontier": (None, KeyBias()),
    "band": (None, KeyBias(age=3, extra_channels=8)),
    "band longer than the queries": (None, KeyBias(age=10)),
}


def draw(
    rows: int, kv_heads: int, group: int, length: int, key_bias: KeyBias | None, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key [rows, heads, s, 8 + e], value [rows, heads, s, 8] with bias channels, if any."""
    generator = torch.Generator().manual_seed(length + group)
    heads = (kv_heads * group, kv_heads, kv_heads)
    query, key, value = (torch.randn(rows, n, length, 8, dtype=dtype, generator=generator) for n in heads)
    if key_bias is not None:
        query, key = (
            torch.nn.functional.pad(tensor, (0, key_bias.extra_channels)) for tensor in (query, key)
        )
        chosen = torch.randint(3, key.shape[:-1], generator=generator)
        query[..., -1], key[..., -1] = 8**0.5, torch.tensor([-3.0, 0.0, HIDDEN], dtype=dtype)[chosen]
    return [tensor.requires_grad_() for tensor in (query, key, value)]


def run(attend: Any, inputs: list[Tensor], chunks: list[int], **options: Any) -> list[Tensor]:
    """Outputs of the last sum(chunks) queries, chunk after chunk, each with the keys up to its end; and
    gradients of all inputs."""
    query, key, value = inputs
    visibility, length = options.pop("visibility"), key.shape[2]
    start, outputs = length - sum(chunks), []
    for chunk in chunks:
        stop = start + chunk
        documents = visibility.documents and visibility.documents.cut(length, (0, stop))
        seen = Visibility(visibility.exclude_self, visibility.window, documents)
        outputs.append(attend(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], seen, **options))
        start = stop
    output = torch.cat(outputs, 2)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    loss = (output * weight).sum() + sum(tensor.sum() * 0 for tensor in inputs)
    return [output, *torch.autograd.grad(loss, inputs)]


def near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_score_matrix(backend: str, way: str) -> None:
    window, key_bias = WAYS[way]
    inputs = draw(ROWS, 2, 2, LENGTH, key_bias, torch.float64)
    for exclude_self, documents, queries in itertools.product(
        (False, True), DOCUMENTS.values(), (LENGTH, LENGTH - 1, 8, 1)
    ):
        options = {
            "visibility": Visibility(exclude_self, window, documents),
            "scale": 8**-0.5,
            "key_bias": key_bias,
        }
        results = [
            run(attend, inputs, [queries], **options) for attend in (BACKENDS[backend], reference.attend)
        ]
        near(*results, tolerance=5e-6)  # the oracle's scores are float32


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rows=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3)]),
    exclude_self=st.booleans(),
    way=st.sampled_from(
        [*((window, None) for window in (None, 1, 2, 5, 13, 40))]
        + [(None, KeyBias(age, extra)) for age, extra in ((1, 0), (1, 8), (2, 0), (5, 8), (12, 0))]
    ),
    cuts=st.none() | st.lists(st.integers(1, 71), max_size=5),
)
def test_chunks_of_queries_are_the_whole(
    backend: str,
    chunks: list[int],
    rows: int,
    heads: tuple[int, int],
    exclude_self: bool,
    way: tuple[int | None, KeyBias | None],
    cuts: list[int] | None,
) -> None:
    window, key_bias = way
    length = sum(chunks)
    documents = None
    if cuts is not None:
        starts = {row * length for row in range(rows + 1)} | {cut for cut in cuts if cut < rows * length}
        documents = Documents.at(sorted(starts), "cpu")
    inputs = draw(rows, *heads, length, key_bias, torch.float64)
    options = {
        "visibility": Visibility(exclude_self, window, documents),
        "scale": 8**-0.5,
        "key_bias": key_bias,
    }
    attend = BACKENDS[backend]
    parts, whole = (run(attend, inputs, lengths, **options) for lengths in (chunks, [length]))
    exact = backend == "sdpa"  # stand-ins of flash-attn are the oracle, whose scores are float32
    near(parts, whole, tolerance=1e-11 if exact else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["whole", "frontier", "band"])
def test_chunks_in_less_precision(dtype: torch.dtype, way: str) -> None:
    window, key_bias = WAYS[way]
    exact = draw(1, 2, 2, 64, key_bias, torch.float64)
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    options = {"visibility": Visibility(window=window), "scale": 8**-0.5, "key_bias": key_bias}
    for actual, right in zip(
        run(sdpa.attend, rounded, [16, 30, 18], **options),
        run(reference.attend, exact, [64], **options),
        strict=True,
    ):
        assert actual.dtype == dtype
        assert (actual.double() - right).norm() / right.norm() < (2e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("pair", [AtenFlash(), AtenEfficient()], ids=["flash", "efficient"])
@pytest.mark.parametrize("way", ["whole", "frontier", "band"])
def test_the_pairs_of_cuda_on_a_stand_in(pair: FlashPair, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key_bias = WAYS[way]
    inputs = draw(2, 2, 3, LENGTH, key_bias, torch.float32)
    options = {"scale": 8**-0.5, "visibility": Visibility()}
    if key_bias is None:
        attend = partial(attend_last, dropout=0.0, pair=pair)
    else:
        attend = partial(attend_biased, dropout=0.0, pair=pair, key_bias=key_bias)
    expected = run(partial(sdpa.attend, key_bias=key_bias), inputs, [9], **options)
    for name, function in inspect.getmembers(CudaStandIn(), inspect.ismethod):
        monkeypatch.setattr(torch.ops.aten, name, function)
    near(run(attend, inputs, [9], **options), expected, tolerance=2e-6)


def test_dropout_is_refused_except_under_a_window() -> None:
    query, key, value = draw(1, 1, 1, 12, None, torch.float32)
    last = query[:, :, 8:], key, value
    for attend in BACKENDS.values():
        for window in (None, 12):
            with pytest.raises(
                UnsupportedError,
                match=r"dropout of 0\.1 in attention of 4 queries to 12 keys cannot be used: it must be 0",
            ):
                attend(*last, Visibility(window=window), scale=1.0, dropout=0.1)
    assert sdpa.attend(*last, Visibility(window=5), scale=1.0, dropout=0.1).shape == (1, 1, 4, 8)


@pytest.mark.parametrize(("window", "asked"), [(None, "_flash_attn_forward"), (5, "flash_attn_func")])
def test_flash_attention_3_attends_itself(window: int | None, asked: str) -> None:
    query, key, value = draw(1, 1, 1, 12, None, torch.float32)
    attend = partial(flash3.attend, kernel=SimpleNamespace())  # has no function at all
    with pytest.raises(AttributeError, match=f"'{asked}'"):
        attend(query[:, :, 8:], key, value, Visibility(window=window), scale=1.0)


class TestDocumentsOfARange:
    @given(
        rows=st.integers(1, 3),
        length=st.integers(2, 12),
        cuts=st.lists(st.integers(1, 35), max_size=6),
        place=st.tuples(st.integers(0, 11), st.integers(1, 12)),
    )
    def test_are_those_of_its_tokens(
        self, rows: int, length: int, cuts: list[int], place: tuple[int, int]
    ) -> None:
        start = min(place[0], length - 1)
        stop = min(start + place[1], length)
        starts = {row * length for row in range(rows + 1)} | {cut for cut in cuts if cut < rows * length}
        documents = Documents.at(sorted(starts), "cpu")
        part = documents.cut(length, (start, stop))
        whole_row, part_row = (
            reference.visible(tokens, rows, Visibility(documents=of), torch.device("cpu"))
            for tokens, of in ((length, documents), (stop - start, part))
        )
        assert torch.equal(part_row, whole_row[:, start:stop, start:stop])
        assert part.known_bounds == tuple(part.cu_seqlens.tolist())
        assert part.cu_seqlens.dtype == torch.int32

    def test_are_made_once(self) -> None:
        documents = Documents.at([0, 3, 8, 16], "cpu")
        assert documents.cut(8, (0, 8)) is documents
        assert documents.cut(8, (2, 8)) is documents.cut(8, (2, 8))
        assert documents.cut(8, (2, 8)).bounds == (0, 1, 6, 12)
        assert documents.cut(8, (0, 4)).bounds == (0, 3, 4, 8)

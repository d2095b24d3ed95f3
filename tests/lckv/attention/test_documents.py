"""Documents: as many calls of kernels for many as for few, and the same attention on all kernels."""

import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lckv.attention import flash, flash3, reference, sdpa
from lckv.attention.aten_pairs import AtenCPU, AtenEfficient, AtenFlash
from lckv.attention.biased import attend_biased
from lckv.attention.document_batches import batches_of
from lckv.attention.flash3 import FlashAttn3Pair
from lckv.attention.flash_attn_pair import FlashAttnPair
from lckv.attention.flash_pair import FlashPair
from lckv.attention.key_bias import KeyBias
from lckv.attention.last_queries import attend_last
from lckv.attention.sequences import layout_of, sequences_of
from lckv.attention.visibility import Documents, Visibility
from tests.lckv.attention.stand_ins import CudaStandIn, FlashAttnInterfaceStandIn, flash_attn, flash_attn_3
from tests.lckv.attention.test_biased import tensors

LENGTH = 512
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "excluded self": {"exclude_self": True},
    "window": {"window": 3},
    "dropout": {"dropout": 0.1},
    "biased": {"key_bias": KeyBias()},
    "biased, excluded self": {"key_bias": KeyBias(), "exclude_self": True},
    "biased from age 3": {"key_bias": KeyBias(3)},
}
PAIRS: dict[str, FlashPair] = {
    "cpu": AtenCPU(),
    "flash": AtenFlash(),
    "efficient": AtenEfficient(),
    "flash-attn": FlashAttnPair(FlashAttnInterfaceStandIn()),
    "flash-attn 3": FlashAttn3Pair(flash_attn_3()),
}


class Operators(TorchDispatchMode):
    """Counts operators that are dispatched, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def packed(rows: int, count: int) -> Documents:
    """`count` documents in each row, of two lengths in turns."""
    pair = LENGTH // (count // 2)
    bounds = [start + shift for start in range(0, rows * LENGTH, pair) for shift in (0, pair // 3)]
    return Documents.at([*bounds, rows * LENGTH], "cpu")


def run(attend: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients."""
    output = attend(*inputs, scale=0.3, **options)
    return [output, *torch.autograd.grad(output.sin().sum(), inputs)]


@pytest.mark.parametrize("kind", KINDS)
def test_operators_do_not_grow_with_documents(kind: str) -> None:
    seen = []
    options = dict(KINDS[kind])
    sight = {name: options.pop(name) for name in ("exclude_self", "window") if name in options}
    inputs = tensors(2, 1, 2, LENGTH, dtype=torch.float32, biases=(-1.0, 0.0))
    for count in (4, 64):
        documents = packed(2, count)
        visibility = Visibility(documents=documents, **sight)
        run(sdpa.attend, inputs, visibility=visibility, **options)  # what is made once for documents
        with Operators() as operators:
            run(sdpa.attend, inputs, visibility=visibility, **options)
        seen.append(operators.names)
    if kind in ("window", "biased from age 3"):  # chunks within documents, which may need padding or not
        assert seen[1].total() <= 1.1 * seen[0].total()
    else:
        assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", ["plain", "excluded self", "biased"])
@pytest.mark.parametrize("backend", ["sdpa", "flash", "flash3"])
def test_one_call_of_a_kernel_for_all_documents(
    backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    if backend == "sdpa":
        monkeypatch.setattr(sdpa, "choose_pair", lambda query: AtenFlash())
        for name, function in inspect.getmembers(CudaStandIn(), inspect.ismethod):
            monkeypatch.setattr(torch.ops.aten, name, counted(name, function))
        attend = sdpa.attend
    else:
        kernel = flash_attn() if backend == "flash" else flash_attn_3()
        for owner in [kernel, *([kernel.flash_attn_interface] if backend == "flash" else [])]:
            for name in [name for name in dir(owner) if "flash_attn_" in name and "interface" not in name]:
                monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
        attend = partial({"flash": flash, "flash3": flash3}[backend].attend, kernel=kernel)
    options = dict(KINDS[kind])
    visibility = Visibility(options.pop("exclude_self", False), documents=packed(1, 64))
    inputs = tensors(1, 1, 1, LENGTH, dtype=torch.float32, biases=(-1.0, 0.0))
    run(attend, inputs, visibility=visibility, **options)
    # through flash-attn's own function where there is no bias, which brings its backward along
    own_function = backend != "sdpa" and kind != "biased"
    assert calls.total() == (1 if own_function else 2)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("queries", [20, 11])
@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_kernels(
    name: str, queries: int, exclude_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With documents of a token, some that end where rows do, and some that go on from before the queries."""
    visibility = Visibility(exclude_self, documents=Documents.at((0, 1, 2, 7, 20, 25, 33, 39, 40), "cpu"))
    for key_bias in (None, KeyBias(), KeyBias(1, 8)):
        extra = 0 if key_bias is None else key_bias.extra_channels
        biases = {} if key_bias is not None else {"biases": (-1.0, 0.0)}
        inputs = tensors(2, 1, 2, 20, extra=extra, **biases)
        inputs[0] = inputs[0].detach()[:, :, -queries:].requires_grad_()
        options = {} if key_bias is None else {"key_bias": key_bias}
        expected = run(reference.attend, inputs, visibility=visibility, **options)
        attend = attend_last if key_bias is None else attend_biased
        with monkeypatch.context() as patch:
            for member, function in inspect.getmembers(CudaStandIn(), inspect.ismethod):
                patch.setattr(torch.ops.aten, member, function)
            found = run(attend, inputs, visibility=visibility, dropout=0.0, pair=PAIRS[name], **options)
        for actual, right in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=0, atol=2e-6)  # the oracle's scores are float32


def test_sequences_of_the_drawing() -> None:
    sequences = sequences_of(Documents.at((0, 3, 7), "cpu"), 7, behind=1)
    assert sequences.bounds.tolist() == [0, 2, 3, 6]
    assert sequences.is_closed.tolist() == [False, True, False]
    assert sequences.closed is not None
    assert sequences.closed.tolist() == [2]
    assert (sequences.cu_seqlens.dtype, sequences.longest) == (torch.int32, 3)


def test_a_layout_and_its_batches_are_made_once() -> None:
    documents = packed(2, 8)
    layout = layout_of(documents, 2, LENGTH, LENGTH, 1)
    assert layout_of(documents, 2, LENGTH, LENGTH, 1) is layout
    assert layout.sequences is not None
    assert batches_of(layout.sequences) is batches_of(layout.sequences)
    assert layout.sequences.closed_rows(2) is layout.sequences.closed_rows(2)


def test_lengths_of_a_batch_differ_little() -> None:
    """So padding is at most a factor of sqrt(2) in tokens, and batches are few whatever the documents are."""
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    bounds = [0, *np.cumsum(lengths).tolist()]
    batches = batches_of(sequences_of(Documents.at(bounds, "cpu"), bounds[-1], behind=0))
    assert len(batches.shapes) <= 2 * np.log2(200) + 1
    assert sum(count for count, _ in batches.shapes) == 300
    assert len(batches.token) <= 2**0.5 * bounds[-1]
    tokens = torch.arange(bounds[-1], dtype=torch.float32)[None, None, :, None]
    assert torch.equal(batches.gather(batches.spread(tokens, -1.0), 1), tokens)


@pytest.mark.parametrize("documents", [None, packed(1, 4)], ids=["rows", "documents"])
def test_autocast_casts_what_comes_in_different_dtypes(documents: Documents | None) -> None:
    query, key, value = tensors(1, 1, 2, LENGTH, dtype=torch.float32, biases=(-1.0, 0.0))
    expected = sdpa.attend(query, key, value, Visibility(documents=documents), scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = sdpa.attend(query, key, value.bfloat16(), Visibility(documents=documents), scale=0.3)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 2e-2 * expected.norm()

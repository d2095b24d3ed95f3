"""Attention to keys with a bias: its parts against the whole score matrix, for every age and on every pair of
kernels."""

import inspect
import itertools
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lckv.attention import flash, reference, sdpa
from lckv.attention.aten_pairs import AtenCPU, AtenEfficient, AtenFlash, choose_pair
from lckv.attention.biased import attend_biased
from lckv.attention.flash3 import FlashAttn3Pair
from lckv.attention.flash_attn_pair import FlashAttnPair
from lckv.attention.flash_pair import Problem
from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.attention.visibility import Documents, Visibility
from lckv.errors import UnsupportedError
from tests.lckv.attention.stand_ins import CudaStandIn, FlashAttnInterfaceStandIn, flash_attn, flash_attn_3
from tests.ranks import run_on_ranks

FRONTIER = KeyBias(age=1)


BACKENDS = {"sdpa": sdpa.attend, "flash": partial(flash.attend, kernel=flash_attn())}


def tensors(
    rows, kv_heads, group, length, channels=8, dtype=torch.float64, biases=(-9.0, 0.0, HIDDEN), extra=0
):
    """Query, key [b, heads, s, d + e], value [b, heads, s, d], laid out [s, b, heads, ...] as in the model,
    with bias channels; the scale is 1 / sqrt(d)."""
    generator = torch.Generator().manual_seed(length + 100 * group)
    heads = (kv_heads * group, kv_heads, kv_heads)
    query, key, value = (
        torch.randn(length, rows, n, channels, dtype=dtype, generator=generator) for n in heads
    )
    chosen = torch.randint(len(biases), key.shape[:-1], generator=generator)
    if extra:
        query, key = (torch.nn.functional.pad(tensor, (0, extra)) for tensor in (query, key))
    query[..., -1], key[..., -1] = channels**0.5, torch.tensor(biases, dtype=dtype)[chosen]
    return [tensor.permute(1, 2, 0, 3).requires_grad_() for tensor in (query, key, value)]


def run(attend, inputs, visibility, key_bias=FRONTIER, queries=None):
    """Output and gradients of the last queries; None: of all."""
    last = slice(0 if queries is None else -queries, None)
    inputs = [inputs[0][:, :, last], *inputs[1:]]
    output = attend(*inputs, visibility, scale=inputs[2].shape[-1] ** -0.5, key_bias=key_bias)
    functional = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output, *torch.autograd.grad((output * functional).sum(), inputs)


def documents_of(rows, length, cuts):
    starts = {row * length for row in range(rows)} | {cut % (rows * length) for cut in cuts}
    return Documents(torch.tensor([*sorted(starts), rows * length], dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@example(rows=2, kv_heads=1, group=2, length=1, exclude_self=True, cuts=None, age=1, extra=0)
@example(rows=1, kv_heads=1, group=1, length=9, exclude_self=True, cuts=None, age=2, extra=0)
@example(rows=2, kv_heads=2, group=2, length=20, exclude_self=False, cuts=None, age=7, extra=8)
@example(rows=1, kv_heads=1, group=1, length=20, exclude_self=False, cuts=None, age=20, extra=0)
@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.integers(1, 20),
    exclude_self=st.booleans(),
    cuts=st.none() | st.lists(st.integers(0, 60), max_size=6),
    age=st.one_of(st.just(1), st.integers(1, 22)),
    extra=st.sampled_from([0, 8]),
)
def test_equals_the_score_matrix(backend, rows, kv_heads, group, length, exclude_self, cuts, age, extra):
    documents = None if cuts is None else documents_of(rows, length, cuts)
    visibility = Visibility(exclude_self=exclude_self, documents=documents)
    key_bias = KeyBias(age, extra)
    inputs = tensors(rows, kv_heads, group, length, extra=extra)
    results = [run(attend, inputs, visibility, key_bias) for attend in (BACKENDS[backend], reference.attend)]
    for actual, right in zip(*results, strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=2e-6)  # the oracle's scores are float32


def test_the_frontier_is_seen_without_its_bias_and_the_others_with_it():
    query, key, value = tensors(1, 1, 1, 3, biases=(HIDDEN,))
    for attend in (sdpa.attend, reference.attend):
        options = {"scale": 1.0, "key_bias": FRONTIER}
        torch.testing.assert_close(attend(query, key, value, Visibility(), **options), value)
        behind = attend(query, key, value, Visibility(exclude_self=True), **options)
        torch.testing.assert_close(behind[:, :, 1:], value[:, :, :-1])
        assert behind[:, :, 0].count_nonzero() == 0


def test_keys_are_seen_without_their_bias_until_they_have_the_age():
    query, key, value = tensors(1, 1, 1, 9, biases=(HIDDEN,))
    query = query * 0  # every key that is seen counts the same
    query[..., -1] = 1.0
    for attend in (sdpa.attend, reference.attend):
        options = {"scale": 1.0, "key_bias": KeyBias(age=3)}
        output = attend(query, key, value, Visibility(), **options)
        expected = [value[:, :, max(0, t - 2) : t + 1].mean(2) for t in range(9)]
        torch.testing.assert_close(output, torch.stack(expected, 2))


def test_without_biases_it_is_plain_attention():
    inputs = tensors(2, 2, 2, 40, dtype=torch.float32, biases=(0.0,))
    for exclude_self in (False, True):
        visibility = Visibility(exclude_self=exclude_self)
        expected = run(sdpa.attend, inputs, visibility, key_bias=None)
        for key_bias in (FRONTIER, KeyBias(age=7)):
            for actual, right in zip(run(sdpa.attend, inputs, visibility, key_bias), expected, strict=True):
                # The bias channel's gradient is its own matter: of young keys there is none.
                torch.testing.assert_close(actual[..., :-1], right[..., :-1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("key_bias", [FRONTIER, KeyBias(age=9), KeyBias(age=9, extra_channels=8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, key_bias):
    inputs = tensors(2, 2, 2, 33, 16, extra=key_bias.extra_channels)
    exact = run(reference.attend, inputs, Visibility(), key_bias)
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    for actual, right in zip(run(sdpa.attend, rounded, Visibility(), key_bias), exact, strict=True):
        assert actual.dtype == dtype
        error = (actual.double() - right).norm() / right.norm()
        assert error < 2e-2


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("key_bias", [FRONTIER, KeyBias(age=3), KeyBias(age=2, extra_channels=8)], ids=str)
def test_gradients_by_finite_differences(key_bias, masks):
    inputs = tensors(1, 1, 2, 8, 4, biases=(-2.0, -0.1), extra=key_bias.extra_channels)
    options = {"scale": 0.5, "dropout": 0.0, "key_bias": key_bias, "pair": AtenCPU(), "masks": masks}
    attend = partial(attend_biased, visibility=Visibility(), **options)
    assert torch.autograd.gradcheck(attend, inputs)


class Products(TorchDispatchMode):
    """Products of queries and keys that the kernel is given, and the channels of the keys with each mask."""

    def __init__(self):
        super().__init__()
        self.number, self.channels = 0, set()

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, key = args[:2]
            self.number += query.shape[:-1].numel() * key.shape[2]
            self.channels.add((kwargs.get("attn_mask") is not None, key.shape[3]))
        return function(*args, **kwargs)


@pytest.mark.parametrize("width", [33, 129, 300])
def test_masks_add_few_products_and_channels_where_keys_are_old_alone(width):
    length, block = 1024, 192
    inputs = tensors(1, 1, 2, length, 64, dtype=torch.float32, extra=8)
    with Products() as products, torch.no_grad():
        sdpa.attend(*inputs, Visibility(), scale=0.125, key_bias=KeyBias(width, 8))
    assert products.number <= 2 * (length**2 + length * block) / 2
    assert products.channels == {(True, 64), (False, 72)}


class Largest(TorchDispatchMode):
    """Entries of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("queries", [512, 300, 1])
@pytest.mark.parametrize(("age", "most"), [(None, 1.0), (1, 1.0), (100, 1.3)])  # masks of 64 x 163
def test_nothing_of_length_times_length_is_made(age, most, queries):
    inputs = tensors(1, 1, 2, 512, dtype=torch.float32)
    with Largest() as largest:
        run(sdpa.attend, inputs, Visibility(), None if age is None else KeyBias(age), queries)
    assert inputs[1].numel() <= largest.numel <= most * inputs[0].numel()


def test_windows_and_dropout_are_refused():
    inputs = tensors(1, 1, 1, 4)
    for attend in BACKENDS.values():
        with pytest.raises(
            UnsupportedError, match=r"a sliding window of 3 tokens over keys .* cannot be used: rem"
        ):
            attend(*inputs, Visibility(window=3), scale=1.0, key_bias=FRONTIER)
        with pytest.raises(UnsupportedError, match=r"dropout of 0.1 in .* cannot be used: it must be 0"):
            attend(*inputs, Visibility(), scale=1.0, key_bias=FRONTIER, dropout=0.1)


def test_sizes_that_make_no_sense():
    with pytest.raises(ValueError, match="age is 0; it must be at least 1"):
        KeyBias(age=0)
    with pytest.raises(ValueError, match="extra_channels is 4; it must be 0 or a multiple of 8"):
        KeyBias(extra_channels=4)


def meta(dtype, channels=16):
    return torch.empty(2, 4, 33, channels, dtype=dtype, device="meta")


def test_the_pair_for_each_device_and_dtype():
    assert isinstance(choose_pair(tensors(1, 1, 1, 2)[0]), AtenCPU)
    assert isinstance(choose_pair(meta(torch.bfloat16)), AtenFlash)
    assert isinstance(choose_pair(meta(torch.float32)), AtenEfficient)
    odd = meta(torch.bfloat16, 12)
    for refuse in (
        lambda: choose_pair(odd),
        lambda: FlashAttnPair(FlashAttnInterfaceStandIn()).forward(Problem(odd, odd, odd, 1.0, causal=True)),
        lambda: FlashAttn3Pair(flash_attn_3()).forward(Problem(odd, odd, odd, 1.0, causal=True)),
    ):
        with pytest.raises(
            UnsupportedError, match=r"heads of 12 channels .* on CUDA it must be a multiple of 8"
        ):
            refuse()
    with pytest.raises(
        UnsupportedError, match=r"in torch.float64 cannot .*: on meta it takes float16, bfloat16"
    ):
        choose_pair(meta(torch.float64))


@pytest.mark.parametrize("pair", [AtenFlash(), AtenEfficient()], ids=["flash", "efficient"])
@pytest.mark.parametrize("length", [2, 33, 40])
@pytest.mark.parametrize("key_bias", [FRONTIER, KeyBias(age=8), KeyBias(age=8, extra_channels=8)], ids=str)
def test_the_pairs_of_cuda_on_a_stand_in(pair, length, key_bias, monkeypatch):
    inputs = tensors(2, 2, 3, length, dtype=torch.float32, extra=key_bias.extra_channels)
    attend = partial(attend_biased, dropout=0.0, pair=pair)
    expected = run(sdpa.attend, inputs, Visibility(), key_bias)
    for name, function in inspect.getmembers(CudaStandIn(), inspect.ismethod):
        monkeypatch.setattr(torch.ops.aten, name, function)
    for actual, right in zip(run(attend, inputs, Visibility(), key_bias), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=2e-6)


def cuda_errors(dtype):
    """Relative errors of output and gradients against the oracle in float64."""
    errors = []
    key_biases = (FRONTIER, KeyBias(age=16, extra_channels=8), None)
    cases = itertools.product(((False, None), (True, None), (True, [50])), key_biases, (77, 30))
    for (exclude_self, cuts), key_bias, queries in cases:
        documents = None if cuts is None else documents_of(2, 77, cuts)
        visibility = Visibility(exclude_self=exclude_self, documents=documents)
        biases = {"extra": key_bias.extra_channels} if key_bias else {"biases": (0.0,)}
        whole = tensors(2, 2, 2, 77, 64, **biases)
        exact = run(reference.attend, whole, visibility, key_bias, queries)
        inputs = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in whole]
        for actual, right in zip(run(sdpa.attend, inputs, visibility, key_bias, queries), exact, strict=True):
            errors.append(float((actual.cpu().double() - right).norm() / right.norm()))
    return errors


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
def test_on_cuda(dtype, tolerance):
    (errors,) = run_on_ranks(1, cuda_errors, dtype, device="cuda")
    assert max(errors) < tolerance

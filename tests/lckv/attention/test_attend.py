"""Every attention backend against the plain oracle: causality, excluded self, windows, documents, grouped
heads, gradients."""

import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lckv.attention import backends, flash, flash3, reference, sdpa
from lckv.attention.backends import (
    choose,
    why_no_flash3_package,
    why_no_flash_package,
    why_not_flash,
    why_not_flash3,
)
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Documents, Visibility
from lckv.errors import UnsupportedError
from tests.lckv.attention.stand_ins import flash_attn, flash_attn_3

BACKENDS = {
    "sdpa": sdpa.attend,
    "flash": partial(flash.attend, kernel=flash_attn()),
    "flash3": partial(flash3.attend, kernel=flash_attn_3()),
}
FUNCTIONS = "".join(f"{name} = 1\n" for name in backends._FLASH3_FUNCTIONS)


def cut(rows: int, length: int, cuts: list[int]) -> Documents:
    """Documents that start at every row and at the positions `cuts` of the flattened batch."""
    starts = {row * length for row in range(rows)} | {place % (rows * length) for place in cuts}
    return Documents(torch.tensor([*sorted(starts), rows * length], dtype=torch.int32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int, Visibility]:
    rows, length, kv_heads, group = (draw(st.integers(1, high)) for high in (3, 20, 2, 3))
    window = draw(st.none() | st.integers(1, 24))
    cuts = draw(st.none() | st.lists(st.integers(0, 60), max_size=6))
    documents = None if cuts is None else cut(rows, length, cuts)
    return rows, length, kv_heads, group, Visibility(draw(st.booleans()), window, documents)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(case=cases())
def test_output_and_gradients_equal_the_oracle(backend: str, case: tuple) -> None:
    rows, length, kv_heads, group, visibility = case
    torch.manual_seed(0)
    leaves = [
        torch.randn(rows, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    ]
    weight = torch.randn(rows, kv_heads * group, length, 8, dtype=torch.float64)
    results = []
    for attend in (reference.attend, BACKENDS[backend]):
        output = attend(*leaves, visibility, scale=0.3)
        gradients = torch.autograd.grad(
            (output * weight).sum() + sum(leaf.sum() * 0 for leaf in leaves), leaves
        )
        results.append((output, *gradients))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the oracle's scores are float32


def test_chunks_of_a_window_meet_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_CHUNK", 4)
    query, key, value = (torch.randn(2, 2, 33, 8) for _ in range(3))
    for window in (1, 3, 4, 5, 32):
        visibility = Visibility(exclude_self=True, window=window)
        expected = reference.attend(query, key, value, visibility, scale=0.3)
        for first in (0, 1, 14):  # of the queries
            output = sdpa.attend(query[:, :, first:], key, value, visibility, scale=0.3)
            torch.testing.assert_close(output, expected[:, :, first:])


@pytest.mark.parametrize("backend", ["sdpa", "flash", "flash3", "reference"])
@pytest.mark.parametrize("documents", [None, cut(1, 6, [3])], ids=["rows", "documents"])
def test_a_query_that_sees_nothing_gives_exactly_zero(backend: str, documents: Documents | None) -> None:
    attend = {**BACKENDS, "reference": reference.attend}[backend]
    query, key, value = (torch.randn(1, 1, 6, 4) for _ in range(3))
    output = attend(query, key, value, Visibility(exclude_self=True, documents=documents), scale=1.0)
    assert output[0, 0, 0].eq(0).all()
    assert documents is None or output[0, 0, 3].eq(0).all()
    assert output[0, 0, 2].ne(0).any()


def test_a_document_across_a_row_is_refused() -> None:
    documents = Documents(torch.tensor([0, 5, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="document at tokens 0 to 4 crosses the end of a row of 4 tokens"):
        documents.spans(4)


@pytest.mark.parametrize("queries", [4096, 2048])
def test_no_quadratic_tensor_under_a_window(queries: int) -> None:
    length = 4096
    query = torch.randn(1, 1, length, 8, requires_grad=True)
    biggest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                biggest = max(biggest, result.numel())
            return result

    with Watch():
        sdpa.attend(query[:, :, -queries:], query, query, Visibility(window=512), scale=1.0)
    assert biggest < length * length / 16


class TestChoice:
    cpu = torch.device("cpu")

    def test_auto_says_why(self) -> None:
        choice = choose("auto", device=self.cpu, dtype=torch.float32, head_dim=64)
        assert choice.name == "sdpa"
        assert choice.reason == "asked for auto: FlashAttention 3 needs CUDA tensors, the model is on cpu"

    @pytest.mark.parametrize(
        ("functions", "obstacle"),
        [
            (None, "is not installed (pip install --no-build-isolation"),
            ({}, "has no flash_attn.flash_attn_func, which flash-attn 2.7 and newer has"),
            (
                {"flash_attn": ["flash_attn_func", "flash_attn_varlen_func"]},
                "flash-attn cannot be imported: No module named 'flash_attn.flash_attn_interface'",
            ),
            (
                {
                    "flash_attn": ["flash_attn_func", "flash_attn_varlen_func"],
                    "flash_attn.flash_attn_interface": [
                        "_flash_attn_forward",
                        "_flash_attn_backward",
                        "_flash_attn_varlen_forward",
                        "_flash_attn_varlen_backward",
                    ],
                },
                None,
            ),
        ],
        ids=["none", "FlashAttention 4 alone", "half", "FlashAttention 2"],
    )
    def test_functions_are_looked_for_not_names(
        self,
        functions: dict[str, list[str]] | None,
        obstacle: str | None,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        if functions is not None:
            (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
            for module, names in functions.items():
                file = (
                    Path(*module.split(".")).with_suffix(".py") if "." in module else "flash_attn/__init__.py"
                )
                (tmp_path / file).write_text("".join(f"def {name}(): ...\n" for name in names))
        monkeypatch.syspath_prepend(tmp_path)
        why_no_flash_package.cache_clear()
        try:
            reason = why_not_flash(torch.device("cuda"), torch.bfloat16, 128)
        finally:
            why_no_flash_package.cache_clear()
            for module in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
                del sys.modules[module]
        assert reason == obstacle or (obstacle is not None and obstacle in str(reason))

    @pytest.mark.parametrize(
        ("content", "capability", "obstacle"),
        [
            (None, 9, "FlashAttention 3 cannot be imported: No module named 'flash_attn_interface'"),
            ("", 9, "flash_attn_interface has no flash_attn_func, flash_attn_varlen_func, _flash_attn_f"),
            (FUNCTIONS, 8, "is for Hopper, this is a card"),
            (FUNCTIONS, 9, None),
        ],
    )
    def test_flash_attention_3(
        self,
        content: str | None,
        capability: int,
        obstacle: str | None,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        if content is not None:
            (tmp_path / "flash_attn_interface.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(backends.torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(backends.torch.cuda, "get_device_name", lambda device: "a card")
        for remembered in (why_no_flash3_package, why_no_flash_package, choose):
            remembered.cache_clear()
        try:
            reason = why_not_flash3(torch.device("cuda"), torch.bfloat16, 128)
            chosen = choose("auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
        finally:
            for remembered in (why_no_flash3_package, why_no_flash_package, choose):
                remembered.cache_clear()
            sys.modules.pop("flash_attn_interface", None)
        if obstacle is None:
            assert (reason, chosen.name, chosen.reason) == (None, "flash3", "asked for auto")
        else:
            assert obstacle in str(reason)
            assert chosen.name == "sdpa"
            assert obstacle in chosen.reason
            assert "flash-attn is not installed" in chosen.reason

    def test_what_flash_attention_3_does_not_take(self) -> None:
        for dtype, head_dim, said in (
            (torch.float32, 64, "FlashAttention 3 takes float16 and bfloat16, not torch.float32"),
            (torch.bfloat16, 512, "FlashAttention 3 takes heads of at most 256 channels, not 512"),
        ):
            assert backends._why_not_tensors("FlashAttention 3", dtype, head_dim) == said
        with pytest.raises(UnsupportedError, match="flash3 cannot be used: FlashAttention 3 needs CUDA"):
            choose("flash3", device=self.cpu, dtype=torch.bfloat16, head_dim=64)

    def test_of_flash_attention_3_only_dropout_goes_through_pytorch(self) -> None:
        query = torch.randn(1, 2, 12, 8)
        attend = partial(flash3.attend, kernel=types.SimpleNamespace())  # has no function at all
        assert attend(query, query, query, Visibility(), scale=0.3, dropout=0.5).shape == query.shape
        with pytest.raises(AttributeError, match="_flash_attn_forward"):
            attend(query, query, query, Visibility(), scale=0.3, key_bias=KeyBias())

    def test_an_explicit_request_never_falls_back(self) -> None:
        with pytest.raises(UnsupportedError, match="flash cannot be used: flash-attn needs CUDA tensors"):
            choose("flash", device=self.cpu, dtype=torch.float32, head_dim=64)

    def test_unknown_name(self) -> None:
        with pytest.raises(
            UnsupportedError,
            match=r"'fused' cannot be .* the backends are auto, sdpa, flash, flash3, reference",
        ):
            choose("fused", device=self.cpu, dtype=torch.float32, head_dim=64)

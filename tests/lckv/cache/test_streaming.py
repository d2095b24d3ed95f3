"""Generation without end says what attention to the kept tokens says, in constant memory."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lckv.attention.visibility import Visibility
from lckv.cache.streaming import StreamingCache
from lckv.policies.base import Extension
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from lckv.rope import inverse_frequencies, rotate, rotation
from tests.lckv.cache.models import MAPS, cache_settings, logits, model, parallel_logits, text
from tests.lckv.cache.recomputing import RecomputingCache

FREQUENCIES = inverse_frequencies(8, 10000.0)


def streaming_cache(built, rows: int = 1, sinks: int = 4, window: int = 16) -> StreamingCache:
    return StreamingCache(
        **cache_settings(built), rows=rows, kv_heads=2, head_dim=8, dtype=built.dtype, device="cpu",
        frequencies=FREQUENCIES, sinks=sinks, window=window,
    )  # fmt: skip


def in_chunks(built, tokens: Sequence[int], chunks: Sequence[int], cache: object) -> Tensor:
    pieces = torch.tensor(tokens).split(list(chunks))
    return torch.cat([logits(built, [piece.tolist()], cache, passes=60)[0] for piece in pieces])


def one_by_one(built, tokens: Sequence[int], cache: object) -> Tensor:
    return in_chunks(built, tokens, [1] * len(tokens), cache)


def tensors_of(cache: StreamingCache) -> list[Tensor]:
    return [tensor for kept in cache._layers.values() for tensor in (*kept.sinks, *kept.newest)]


@pytest.mark.parametrize("name", [*MAPS, "mixed", "two sources"])
def test_equals_recomputation(name: str) -> None:
    built, tokens = model(name), text(70)
    expected = one_by_one(built, tokens, RecomputingCache(1, FREQUENCIES, 4, 16))
    found = one_by_one(built, tokens, streaming_cache(built))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)
    # As long as nothing is dropped, that is what the model says of the text.
    torch.testing.assert_close(found[:20], parallel_logits(built, tokens[:20]), rtol=0, atol=5e-4)
    assert not torch.allclose(found[20:40], parallel_logits(built, tokens[:40])[20:], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("CLA", [190]),
        ("YOCO", [3, 1, 40, 1, 1, 16, 128]),
        ("windowed and whole", [150, 1, 39]),
        ("LCKV", [50]),
        ("sliding cyclic", [3, 1, 30, 1, 1, 24]),
        ("two sources", [3, 1, 30, 1, 1, 24]),
    ],
)
def test_prompts_in_chunks(name: str, chunks: list[int]) -> None:
    """Of any length, longer than the window too."""
    built, tokens = model(name), text(sum(chunks))
    found = in_chunks(built, tokens, chunks, streaming_cache(built))
    torch.testing.assert_close(found, one_by_one(built, tokens, streaming_cache(built)), rtol=0, atol=5e-4)


@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (1, 1), (6, 2)])
def test_any_sinks_and_window(sinks: int, window: int) -> None:
    built, tokens = model("LCKV"), text(40)
    expected = one_by_one(built, tokens, RecomputingCache(1, FREQUENCIES, sinks, window))
    for chunks in ([1] * 40, [17, 1, 1, 21]):
        found = in_chunks(built, tokens, chunks, streaming_cache(built, sinks=sinks, window=window))
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths(side: str) -> None:
    built, texts = model("CLA"), [text(50, 1), text(23, 2), text(31, 3)]
    cache, width = streaming_cache(built, rows=3), 20
    counts = torch.tensor([20, 9, 1])
    padded = torch.zeros(3, width, dtype=torch.int64)
    counted = torch.arange(width) < counts[:, None]
    if side == "left":
        counted = counted.flip(1)
    for row, tokens in enumerate(texts):
        padded[row, counted[row]] = torch.tensor(tokens[: counts[row]])
    with torch.inference_mode():
        hidden = built.model.run(built.model.embed_tokens(padded), cache, counted=counted).last_hidden_state
        said = [[built.lm_head(hidden[row, counted[row]])] for row in range(3)]
        for step in range(30):
            tokens = [texts[row][int(counts[row]) + step : int(counts[row]) + step + 1] for row in range(3)]
            for row, part in enumerate(logits(built, [token or [0] for token in tokens], cache)):
                said[row].append(part[: len(tokens[row])])
    for row, tokens in enumerate(texts):
        alone = one_by_one(built, tokens, streaming_cache(built))
        torch.testing.assert_close(torch.cat(said[row]), alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "exclude_self", "tolerance"),
    [(torch.float32, False, 2e-5), (torch.float32, True, 2e-5), (torch.bfloat16, False, 3e-2)],
)
def test_thousands_of_tokens(dtype: torch.dtype, exclude_self: bool, tolerance: float) -> None:
    """Far beyond any training length, in memory that stays the same, and as precise as at the beginning."""
    generator = torch.Generator().manual_seed(0)
    length, rows, channels, scale = 3000, 2, 32, 32**-0.5
    frequencies, visibility = inverse_frequencies(channels, 10000.0), Visibility(exclude_self)
    key, value = torch.randn(2, length, rows, 2, channels, generator=generator).to(dtype)
    query = torch.randn(length, rows, 4, channels, generator=generator).to(dtype)
    cache = StreamingCache(
        [0], DenseConfig().build(), {}, rows=rows, kv_heads=2, head_dim=channels, dtype=dtype, device="cpu",
        frequencies=frequencies, window=16,
    )  # fmt: skip
    memory, worst = [tensor.data_ptr() for tensor in tensors_of(cache)], 0.0
    for token in range(length):
        angles = rotation(cache.seen[:, None], frequencies)
        new = Extension(rotate(key[token].float(), angles).to(dtype)[None], value[token, None])
        turned = rotate(query[token].float(), angles).to(dtype)[:, :, None]
        found = cache.attend(0, turned, new, None, visibility, scale=scale, key_bias=None)
        cache.commit({0: new}, None)
        if token < 60 or token % 127 == 0:
            oracle = RecomputingCache(rows, frequencies, 4, 16)
            seen = [index for index in range(token + 1) if index < 4 or index > token - 16]
            oracle.tokens, oracle.kept = [len(seen) - 1] * rows, {
                0: [[(key[index, row], value[index, row]) for index in seen[:-1]] for row in range(rows)]
            }  # fmt: skip
            own = Extension(key[token, None], value[token, None])
            expected = oracle.attend(0, query[token][:, :, None], own, None, visibility, scale=scale)
            worst = max(worst, float((found - expected).abs().max()))
        assert int(cache.seen.max()) <= 4 + 2 * 16
    assert worst < tolerance
    assert memory == [tensor.data_ptr() for tensor in tensors_of(cache)]
    assert cache.num_bytes == 2 * rows * 2 * (4 + 15) * channels * dtype.itemsize + 2 * rows * 8


def test_memory_of_windowed_layers() -> None:
    """They keep their own window, without sinks."""
    shapes = [
        kept.newest[0].shape[2] + kept.sinks[0].shape[2]
        for kept in streaming_cache(model("YOCO"))._layers.values()
    ]
    assert shapes == [4, 4, 4, 15 + 4]


def test_what_is_refused() -> None:
    settings = {
        "rows": 1,
        "kv_heads": 2,
        "head_dim": 8,
        "dtype": torch.float32,
        "device": "cpu",
        "frequencies": FREQUENCIES,
    }
    with pytest.raises(
        ValueError,
        match="the KV policy is dmc; streaming with attention sinks drops single tokens, which needs a",
    ):
        StreamingCache([0], DMCPolicy(DMCConfig(stage="finetune")), {}, **settings, window=16)
    for wrong, least in (({"window": 0}, 1), ({"sinks": -1, "window": 4}, 0), ({"rows": 0, "window": 4}, 1)):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name} is {wrong[name]}; it must be at least {least}"):
            StreamingCache([0], DenseConfig().build(), {}, **{**settings, **wrong})
    cache = StreamingCache([0], DenseConfig().build(), {}, **settings, window=16)
    with pytest.raises(ValueError, match=r"the cache holds layers \[0\]; keys and values of \[\] came"):
        cache.commit({}, None)

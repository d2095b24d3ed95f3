"""Predicted memory of the KV cache is what the allocator needs; questions that make no sense are answered
with what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from lckv.cache.contiguous import ContiguousCache
from lckv.cache.cost import CacheModel, largest_batch, longest_context, pages_touched
from lckv.cache.paged import PagedCache
from lckv.config import CompressionConfig
from lckv.generation.memory import cache_model, paged_cache
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.dense.config import DenseConfig
from lckv_megatron.commands.kv_memory import main
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, SHARED, WINDOWS, model

RUN = ["--memory", "1GiB", "--model.num_layers", "4"]


def allocated(made: LCKVLlamaForCausalLM, batch: int, tokens: int, page_size: int) -> PagedCache:
    """A cache for `batch` sequences of `tokens` tokens, as large as can ever be needed."""
    cpu = torch.device("cpu")
    return paged_cache(
        made.config,
        dtype=torch.float32,
        device=cpu,
        page_size=page_size,
        max_sequences=batch,
        max_tokens=tokens,
    )


@torch.no_grad()
def fill(made: LCKVLlamaForCausalLM, cache: PagedCache, batch: int, tokens: int, chunk: int) -> int:
    """Take in random tokens, `chunk` at a time; the most pages that were in use."""
    sequences, most = [cache.open() for _ in range(batch)], 0
    ids = torch.randint(1, 61, (batch, tokens), generator=torch.Generator().manual_seed(1))
    for part in ids.split(chunk, 1):
        made.model.run(made.model.embed_tokens(part), cache.rows(sequences))
        most = max(most, cache.pages_in_use)
    return most


@pytest.mark.parametrize("layer_types", [PLAIN, SHARED, CYCLIC, WINDOWS])
@pytest.mark.parametrize(("tokens", "page_size"), [(13, 1), (31, 4), (32, 4)])
def test_pages_are_those_in_use(layer_types: str | None, tokens: int, page_size: int) -> None:
    made = model(layer_types)
    predicted = cache_model(made.config, "float32", page_size)
    cache = allocated(made, 2, tokens, page_size)
    assert cache.bytes_per_page == predicted.page_bytes
    assert fill(made, cache, 2, tokens, chunk=1) == 2 * predicted.pages(tokens)


def test_all_bytes_are_predicted() -> None:
    made, tokens = model(SHARED, MERGING), 1024
    predicted = cache_model(made.config, "float32", page_size=16)
    cache = allocated(made, 3, tokens, 16)
    assert (
        cache.bytes_per_sequence == predicted.table_bytes(tokens) + predicted.state_bytes + 8
    )  # a number of tokens
    assert cache.num_bytes == pytest.approx(
        3 * predicted.sequence_bytes(tokens), rel=0.02
    )  # a page of zeros, and the above


def test_merged_slots_are_predicted_from_the_measured_ratio() -> None:
    made = model(SHARED, MERGING)
    dense = cache_model(made.config, "float32", page_size=1)
    cache = allocated(made, 2, 48, 1)
    used = fill(made, cache, 2, 48, chunk=48)
    assert cache.compression_ratio > 1.2
    predicted = CacheModel(**{**vars(dense), "compression_ratio": cache.compression_ratio})
    heads = 2 * 2 * 2
    assert used <= 2 * predicted.pages(48) < used + heads  # rounded up for each head


def test_bytes_per_token_are_those_of_the_contiguous_cache() -> None:
    made, sizes = model(SHARED), []
    for tokens in (32, 64):
        cache = ContiguousCache([0, 2], DenseConfig().build(), {})
        with torch.no_grad():
            made.model.run(made.model.embed_tokens(torch.ones(1, tokens, dtype=torch.int64)), cache)
        sizes.append(cache.num_bytes)
    assert sizes[1] - sizes[0] == 32 * cache_model(made.config, "float32", 16).bytes_per_token


def test_what_fits_just_fits() -> None:
    predicted = CacheModel(
        num_layers=4,
        kv_heads=2,
        head_dim=8,
        compression=CompressionConfig("0s_1s_2_2", sliding_window=32),
        dtype="bfloat16",
        page_size=16,
        compression_ratio=1.0,
    )
    memory = 10**6
    batch = largest_batch(predicted, 500, memory)
    assert batch * predicted.sequence_bytes(500) <= memory < (batch + 1) * predicted.sequence_bytes(500)
    longest = longest_context(predicted, 3, memory)
    assert 3 * predicted.sequence_bytes(longest) <= memory < 3 * predicted.sequence_bytes(longest + 1)
    assert longest_context(predicted, 1, 10) == 0


@pytest.mark.parametrize(
    ("slots", "page_size", "pages"), [(0, 4, 1), (1, 4, 1), (2, 4, 2), (5, 4, 2), (6, 4, 3), (7, 1, 7)]
)
def test_neighbouring_slots_touch_pages(slots: int, page_size: int, pages: int) -> None:
    touched = {len({slot // page_size for slot in range(first, first + slots)}) for first in range(page_size)}
    assert max(1, *touched) == pages_touched(slots, page_size) == pages


def test_a_run_next_to_a_plain_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--compression.layer_types",
        "0_2_2_3",
        "--context",
        "160",
        "1600",
        "--batch",
        "8",
        "--train.precision",
        "bf16",
    ]
    assert main([*RUN, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plain"]["kv_bytes_per_token"] == 4 * 4 * 64 * 2 * 2
    assert found["model"]["kv_bytes_per_token"] == 3 * 4 * 64 * 2 * 2
    assert found["plain"]["largest_batch"]["1600"] == 2**30 // (4 * 4 * (100 * 4096 + 100 * 4 + 8))
    assert main([*RUN, *arguments]) == 0
    shown = capsys.readouterr().out
    assert (
        "keys and values of 3 of 4 layers, 4 KV heads of 64 channels in bfloat16; pages of 16 slots, 4.00 KiB"
        in shown
    )
    assert (
        "largest batch at 1,600 tokens" in shown
        and "longest context of 8 at once" in shown
        and "1.33x" in shown
    )


def test_merging_is_counted_with_its_target_or_as_measured(capsys: pytest.CaptureFixture[str]) -> None:
    dmc = [
        f"--compression.policy.{name}"
        for name in ("name=dmc", "stage=retrofit", "target_compression_ratio=4")
    ]
    for given, ratio in ([], 4.0), (["--compression-ratio", "2.5"], 2.5):
        assert main([*RUN, *dmc, *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["compression_ratio"] == ratio
        assert found["plain"]["kv_bytes_per_token"] / found["model"]["kv_bytes_per_token"] == ratio
        assert found["model"]["state_bytes_per_sequence"] == 4 * 4 * 11 * (2 * 64 + 1) * 4
    assert main([*RUN, *dmc]) == 0
    said = "KV policy dmc, stage retrofit: target 4 tokens per slot, window 12; 4 tokens per slot; its state:"
    assert f"{said} 88.69 KiB per sequence" in capsys.readouterr().out


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path, WINDOWS)
    assert main(["--memory", "1MiB", "--model", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "keys and values of 3 of 4 layers, 2 KV heads of 8 channels in float32" in shown
    assert "2 of them only for a window of 3 tokens" in shown
    assert "largest batch at 64 tokens" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compression.layer_types", "0_9_2_3"], "reads layer 9, but the model has 4 layers, 0 to 3"),
        (["--model.hidden_size", "30"], "model.hidden_size is 30"),
        (
            ["--compression-ratio", "2"],
            "--compression-ratio is 2, but this model keeps every token: its policy is dense",
        ),
        (
            ["--compression-ratio", "2", "--compression.policy.name", "dmc"],
            "keeps every token: its policy is dmc in stage zero_out",
        ),
        (
            [
                "--compression-ratio",
                "0.5",
                "--compression.policy.name=dmc",
                "--compression.policy.stage=finetune",
            ],
            "--compression-ratio is 0.5; it must be at least 1",
        ),
        (
            ["--model", "nowhere"],
            "--model.num_layers 4 is given beside --model; a folder says all of the model itself",
        ),
    ],
)
def test_bad_questions(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *arguments]) == 2
    assert said in capfd.readouterr().err


def test_a_folder_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--memory", "1GiB", "--model", str(tmp_path)]) == 2
    assert "is not a Hugging Face folder: it has no config.json" in capfd.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["--memory", "1GiB", "--model", str(tmp_path)]) == 2
    assert "model_type is 'gpt2'" in capfd.readouterr().err

"""Sampling: greedy follows the logits, seeds repeat, pipeline stages agree, the end of a document ends it."""

import argparse

import pytest
import torch

from lckv_megatron.checkpoint_options import tokenizer_settings
from lckv_megatron.commands.sample import main
from megatron_ext.config import DataConfig, ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.sampling import continue_tokens
from tests.megatron_ext.model.stages import MAPS, make_stage
from tests.ranks import run_on_ranks


def sampled(tp: int, pp: int, temperature: float, seed: int, eod: int = -1) -> list[int]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    stage = make_stage(MAPS["yoco"], parallel).eval()
    options = {
        "new_tokens": 8,
        "context": 6,
        "temperature": temperature,
        "top_k": 20,
        "eod": eod,
        "seed": seed,
    }
    return continue_tokens(stage, [1, 2, 3], **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_ranks_of_all_layouts_choose_the_same(temperature: float) -> None:
    (expected,) = run_on_ranks(1, sampled, 1, 1, temperature, 7)
    assert len(expected) == 8
    assert run_on_ranks(4, sampled, 2, 2, temperature, 7) == [expected] * 4


def test_seeds_matter() -> None:
    (one,), (other,) = (run_on_ranks(1, sampled, 1, 1, 1.0, seed) for seed in (1, 2))
    assert one != other


def test_the_end_of_a_document_ends_it() -> None:
    (whole,) = run_on_ranks(1, sampled, 1, 1, 0.0, 1)
    (ended,) = run_on_ranks(1, sampled, 1, 1, 0.0, 1, whole[4])
    assert ended == whole[: whole.index(whole[4])]


def test_greedy_is_the_likeliest_token() -> None:
    assert run_on_ranks(1, greedy_and_likeliest) == [True]


def greedy_and_likeliest() -> bool:
    stage = make_stage(MAPS["yoco"]).eval()
    tokens = torch.tensor([[1, 2, 3]])
    logits, _ = stage(tokens, torch.arange(3)[None])
    options = {"new_tokens": 1, "context": 6, "temperature": 0.0, "top_k": 1, "eod": -1, "seed": 1}
    return continue_tokens(stage, [1, 2, 3], **options) == [int(logits[0, -1].argmax())]


@pytest.mark.parametrize("option", ["--top-k=-1", "--new-tokens=0", "--new_tokens=0"])
def test_impossible_options(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--load", "nowhere", "--prompt", "x", option]) == 2
    assert "they must be at least 0 and 1" in capfd.readouterr().err


@pytest.mark.parametrize("temperature", ["-1.0", "nan", "inf", "1e-40"])
def test_impossible_temperatures(temperature: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--load", "nowhere", "--prompt", "x", f"--temperature={temperature}"]) == 2
    expected = f"--temperature is {temperature}; it must be 0 (the likeliest token), or from 1e-15 to 1e+15."
    assert expected in capfd.readouterr().err


def test_a_run_without_tokenizer_needs_one() -> None:
    options = argparse.Namespace(tokenizer_type=None, tokenizer_model=None)
    with pytest.raises(
        ConfigError, match=r"the run had no tokenizer .*; give --tokenizer-type and --tokenizer-model"
    ):
        tokenizer_settings(DataConfig(), options)
    options = argparse.Namespace(tokenizer_type="tiktoken", tokenizer_model="ranks")
    assert tokenizer_settings(DataConfig(), options).tokenizer_model == "ranks"


def test_a_prompt_that_is_no_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--load", "nowhere", "--prompt", "a\udcff"]) == 2
    assert "--prompt: character 1 is U+DCFF, half of a surrogate pair" in capfd.readouterr().err

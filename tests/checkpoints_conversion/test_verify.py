"""Comparing two models: what is measured, what is refused, and the program with its exit status."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion import megatron_logits
from checkpoints_conversion.__main__ import main
from checkpoints_conversion.convert import hf_to_megatron, legacy_to_megatron
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.opening import open_huggingface, open_megatron
from checkpoints_conversion.reference import common_dtype, differences
from checkpoints_conversion.verify import Comparison, Tolerance, compare, random_tokens
from megatron_ext.config import ParallelConfig
from tests.checkpoints_conversion.formats.test_megatron_legacy import publish
from tests.lckv.families.tiny_models import saved_model
from tests.megatron_ext.model.stages import VOCAB
from tests.ranks import run_on_ranks

EQUAL = Comparison(
    rows=1, length=2, max_difference=1e-4, mean_difference=1e-5, largest_logit=10.0, agreement=1.0
)
NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "within"),
    [
        ({}, True),
        ({"max_difference": 1.1e-3}, False),
        ({"agreement": 0.99}, False),
        ({"max_difference": NAN}, False),
        ({"largest_logit": NAN}, False),
        ({"max_difference": 0.0, "largest_logit": 0.0}, True),
    ],
)
def test_tolerance(changed: dict[str, Any], within: bool) -> None:
    """The difference counts as a share of the largest |logit|."""
    found = replace(EQUAL, **changed)
    assert found.within(Tolerance(1e-4, 0.999)) == within
    assert list(found.lines(Tolerance()))[-1].endswith("equal" if within else "DIFFERENT")


def test_tokens_are_random_and_repeatable() -> None:
    tokens = random_tokens(7, rows=30, length=20, seed=1)
    assert (tokens.shape, tokens.dtype) == ((30, 20), np.int64)
    assert set(tokens.flat) == set(range(7))
    assert (tokens == random_tokens(7, rows=30, length=20, seed=1)).all()
    assert (tokens != random_tokens(7, rows=30, length=20, seed=2)).any()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("float16", "float32", "float16"),
        ("float16", "bfloat16", "bfloat16"),
    ],
)
def test_common_dtype(first: str, second: str, expected: str) -> None:
    assert common_dtype(getattr(torch, first), getattr(torch, second)) == getattr(torch, expected)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, its conversions `plain` and `shared`, and another model `other`."""
    folder = tmp_path_factory.mktemp("models")
    saved_model(folder / "hf", "llama")
    saved_model(folder / "other", "llama", rms_norm_eps=1e-6, tie_word_embeddings=True)
    hf_to_megatron(str(folder / "hf"), folder / "plain", proof="never")
    hf_to_megatron(
        str(folder / "hf"), folder / "shared", changes={"compression.layer_types": "0_2_2"}, proof="never"
    )
    return folder


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*arguments: Any, layer_types: str | None, timeout_seconds: float) -> None:
        parallel = arguments[3]
        ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        run_on_ranks(ranks, megatron_logits.write_logits, *arguments, layer_types, timeout=timeout_seconds)

    monkeypatch.setattr("checkpoints_conversion.verify.compute", compute)


def verify(models: Path, hf: str, megatron: str, *options: str) -> int:
    return main(
        ["verify", "--hf-path", str(models / hf), "--megatron-path", str(models / megatron), *options]
    )


@pytest.mark.usefixtures("pool")
def test_numbers_and_exit_status(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(models, "hf", "plain") == 0
    said = capsys.readouterr().out
    assert "tokens              4 x 128" in said
    assert "max |difference|    " in said
    assert "top-1 agreement     100.000 %, at least 99.9 %" in said
    assert "result              equal" in said

    tensors = load_file(models / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] += 0.01
    saved_model(tmp_path / "changed", "llama")
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    arguments = ["verify", "--hf-path", str(tmp_path / "changed"), "--megatron-path", str(models / "plain")]
    assert main(arguments) == 1
    assert "result              DIFFERENT" in capsys.readouterr().out
    assert main([*arguments, "--tolerance", "0.5", "--agreement", "0.5"]) == 0


@pytest.mark.usefixtures("pool")
def test_a_few_layers_at_a_time(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every layer is compared, with what it reads; only the layer that differs is said to."""
    assert verify(models, "hf", "shared", "--layers-at-once", "1", "--rows", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    of_layers = [line.split(maxsplit=1)[1] for line in lines if line.startswith("layers ")]
    assert of_layers == ["0", "1, 2", "2"]
    assert sum(line.endswith("equal") for line in lines) == 3

    saved_model(tmp_path / "changed", "llama")
    tensors = load_file(models / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] += 0.01
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    arguments = ["verify", "--hf-path", str(tmp_path / "changed"), "--megatron-path", str(models / "plain")]
    assert main([*arguments, "--layers", "0,2"]) == 0
    assert main([*arguments, "--layers", "1"]) == 1
    capsys.readouterr()
    assert main([*arguments, "--layers-at-once", "2"]) == 1
    results = [line for line in capsys.readouterr().out.splitlines() if line.startswith("result")]
    assert [line.split()[-1] for line in results] == ["DIFFERENT", "equal"]
    assert main([*arguments, "--layers", "3"]) == 2


@pytest.mark.usefixtures("pool")
def test_differences_are_measured(models: Path) -> None:
    """Against the plain computation of everything that is reported."""
    original, megatron = (open_huggingface(models / "hf"), open_megatron(models / "plain"))
    weights = load_file(models / "hf" / "model.safetensors")
    tokens = random_tokens(61, rows=2, length=9, seed=3)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(models / "hf").eval()
    found = compare(original, megatron, tokens)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits
    assert found.largest_logit == pytest.approx(logits.abs().max().item(), rel=1e-5)
    assert (found.rows, found.length, found.agreement) == (2, 9, 1.0)
    assert 0 < found.mean_difference < found.max_difference < 1e-5 * found.largest_logit
    assert len(weights) == 3 * 9 + 3


@pytest.mark.usefixtures("pool")
def test_more_ranks_than_heads_are_stated(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(models, "hf", "shared", "--parallel.tensor_model_parallel_size", "4", "--rows", "1") == 0
    assert "2 key/value heads, 4 ranks: each head is on 2 of them" in capfd.readouterr().err


@pytest.mark.usefixtures("pool")
def test_tokens_from_a_file(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(12).reshape(2, 6))
    assert verify(models, "hf", "shared", "--tokens", str(tmp_path / "tokens.npy")) == 0
    assert "tokens              2 x 6" in capsys.readouterr().out
    np.save(tmp_path / "tokens.npy", np.full((1, 2), 61))
    assert verify(models, "hf", "plain", "--tokens", str(tmp_path / "tokens.npy")) == 2


@pytest.mark.usefixtures("pool")
def test_a_legacy_checkpoint(tmp_path: Path) -> None:
    publish(tmp_path / "dmc", vocab_size=VOCAB)
    legacy_to_megatron(tmp_path / "dmc", tmp_path / "megatron", proof="never")
    assert verify(tmp_path, "dmc", "megatron") == 0


@pytest.mark.usefixtures("pool")
def test_what_a_legacy_checkpoint_does_not_say_is_given_to_all_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "dmc", dmc_cr=...)
    legacy_to_megatron(
        tmp_path / "dmc", tmp_path / "megatron", vocab_size=VOCAB, given={"dmc_cr": 4}, proof="never"
    )
    unsaid = ["--vocab-size", str(VOCAB), "--argument", "dmc_cr=4"]
    assert verify(tmp_path, "dmc", "megatron", *unsaid) == 0
    assert main(["inspect", str(tmp_path / "dmc"), *unsaid]) == 0
    assert verify(tmp_path, "dmc", "megatron") == 2
    assert verify(tmp_path, "megatron", "megatron", *unsaid) == 2
    assert "megatron is none. Leave them out" in capfd.readouterr().err


@pytest.mark.nightly
def test_layout_of_a_shared_model_in_processes_of_its_own(models: Path) -> None:
    """As a user does it."""
    command = [sys.executable, "-m", "checkpoints_conversion", "verify", "--hf-path", str(models / "hf")]
    layout = ["--nproc-per-node", "2", "--parallel.tensor_model_parallel_size", "2"]
    result = subprocess.run(
        [*command, "--megatron-path", str(models / "shared"), *layout],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "result              equal" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nproc-per-node", "3"], "--nproc-per-node is 3; it must be 1"),
        (
            ["--parallel.tensor_model_parallel_size", "3"],
            "model.num_attention_heads is 4 and parallel.tensor_model_parallel_size is 3",
        ),
        (
            ["--parallel.pipeline_model_parallel_size", "2"],
            "model.num_layers is 3 and parallel.pipeline_model_parallel_size is 2",
        ),
        (["--rows", "0"], "--rows is 0"),
        (["--tokens", "nowhere.npy"], "--tokens nowhere.npy cannot be read"),
    ],
)
def test_bad_options(options: list[str], said: str, models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(models, "hf", "shared", *options) == 2
    assert said in capfd.readouterr().err


def test_different_models_are_told_apart_by_their_settings(
    models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verify(models, "other", "plain") == 2
    said = capfd.readouterr().err
    assert "are different models, of which the outputs cannot agree" in said
    assert "layernorm_epsilon: 1e-06, 1e-05" in said
    assert "untie_embeddings_and_output_weights: False, True" in said
    assert "layer_types" not in said


def test_passes_matter_where_layers_are_iterated(models: Path) -> None:
    shared, plain = (open_megatron(models / name).description for name in ("shared", "plain"))
    for description, named in ((shared, {"forward_passes": "7, 3"}), (plain, {})):
        other = replace(description, compression=replace(description.compression, forward_passes=3))
        assert differences(description, other) == named


def test_a_proof_that_does_not_end(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchrun's ranks are sessions of their own, as here."""
    monkeypatch.setattr(sys, "executable", _program(tmp_path, "setsid -w sleep 200"))
    start = time.monotonic()
    with pytest.raises(
        ConversionError, match=r"were not there after 0\.5 seconds; give its 2 process\(es\) more time"
    ):
        _compute(models, tmp_path, 0.5)
    assert time.monotonic() - start < 100


def test_a_proof_whose_processes_fail(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", _program(tmp_path, "echo out of memory >&2; exit 3"))
    with pytest.raises(
        ConversionError, match=r"could not be computed by 2 process\(es\)\. .*\n  out of memory"
    ):
        _compute(models, tmp_path, 60)


def _program(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def _compute(models: Path, folder: Path, timeout: float) -> None:
    megatron, output = open_megatron(models / "plain"), folder / "logits.npy"
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    tokens = random_tokens(61, rows=1, length=2, seed=1)
    megatron_logits.compute(megatron.path, tokens, output, parallel, torch.float32, timeout_seconds=timeout)

"""Perplexity is that of the logits, on every layout and in Hugging Face folders; bad texts are named."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.training.perplexity import Perplexity, perplexity
from tests.megatron_ext.data.builders import TEXTS, train_sentencepiece, write_tokenizer_json
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks
from tools.perplexity import main

VOCABULARY = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, a tokenizer, checkpoints of a run (run/) and a Hugging Face folder (hf/)."""
    folder = tmp_path_factory.mktemp("perplexity")
    (folder / "text.txt").write_text("".join(TEXTS))
    train_sentencepiece(folder / "tokenizer.model", VOCABULARY)
    run = tiny_run(
        compression={"layer_types": "0s_1s_2_2", "sliding_window": 8},
        model={"vocab_size": VOCABULARY},
        checkpoint={"save": str(folder / "run")},
        train={"train_iters": 3},
    )
    run_on_ranks(1, train, run)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    write_tokenizer_json(folder / "hf" / "tokenizer.json")
    return folder


def measure(folder: Path, *arguments: str) -> int:
    return main(["--text", str(folder / "text.txt"), "--rows", "3", "--row_length", "9", *arguments])


def of_run(folder: str, output: str, *layout: str) -> int:
    tokenizer = ("--tokenizer_type=sentencepiece", f"--tokenizer_model={folder}/tokenizer.model")
    return measure(Path(folder), f"--load={folder}/run", f"--output={output}", *tokenizer, *layout)


def test_every_layout_gives_the_same_perplexity(folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, ranks, tp, pp in [("one", 1, 1, 1), ("tp", 2, 2, 1), ("pp", 2, 1, 2), ("dp", 2, 1, 1)]:
        output, layout = tmp_path / name, (f"--tensor_model_parallel_size={tp}", f"--pipeline_model_parallel_size={pp}")
        assert run_on_ranks(ranks, of_run, str(folder), str(output), *layout) == [0] * ranks
        found[name] = json.loads(output.read_text())
    assert found["one"]["tokens"] == 24
    assert 1 < found["one"]["perplexity"] < 10 * VOCABULARY
    assert found["one"]["perplexity"] == pytest.approx(math.exp(found["one"]["loss"]))
    for name, values in found.items():
        assert values["loss"] == pytest.approx(found["one"]["loss"], abs=2e-6), name


def test_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(folder, "--hf_path", str(folder / "hf"), "--output", str(tmp_path / "out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    tokens = load_tokenizer("huggingface", str(folder / "hf")).encode((folder / "text.txt").read_text())
    rows = torch.tensor(tokens[:27]).view(3, 9)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()(rows, labels=rows).loss.item()
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert (
        f"perplexity {math.exp(found['loss']):.4f} ({found['loss']:.6f} nats per token, 24 tokens)"
        in capsys.readouterr().out
    )


def test_perplexity_of_known_logits() -> None:
    rows = torch.tensor([[0, 1, 2], [2, 1, 0]])
    certain = torch.nn.functional.one_hot(rows.roll(-1, 1), 3) * 100.0
    assert perplexity(rows, certain) == Perplexity(0.0, 4)
    assert perplexity(rows, torch.zeros(2, 3, 3)).value == pytest.approx(3)
    assert perplexity(rows, [None, None]) is None
    assert Perplexity(1e5, 1).value == math.inf


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "900"], "rows of 9 need 8,100. Give a longer text, or fewer or shorter rows"),
        (["--rows", "0"], "--rows is 0 and --row_length is 9; they must be at least 1 and 2"),
        (["--text", "missing.txt"], "--text missing.txt cannot be read"),
        (["--hf_path", "missing"], "--hf_path missing is not a Hugging Face folder: it has no config.json"),
    ],
)
def test_bad_input(arguments: list[str], said: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert measure(folder, "--hf_path", str(folder / "hf"), *arguments) == 2
    assert said in capfd.readouterr().err


def test_folder_needs_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert measure(folder, "--hf_path", str(folder / "hf")) == 2
    assert "--hf_path runs on one process; start it without torchrun" in capfd.readouterr().err

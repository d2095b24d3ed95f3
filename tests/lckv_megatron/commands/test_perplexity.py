"""Perplexity is that of the model's logits, however it is computed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lckv.generation.loading import load_model, load_tokenizer
from lckv.losses import chunk_size
from lckv_megatron.commands.perplexity import main
from lckv_megatron.scoring.text_windows import Text
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import CYCLIC, CYCLIC_WINDOWS, MERGING, PLAIN, SHARED, TWO_GROUPS, WINDOWS
from tests.lckv.tokenizer_json import TEXTS
from tests.megatron_ext.data.builders import train_sentencepiece
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks

TEXT = "hello world, document 3 of the corpus: word word word\n" * 3
CONTEXT = 10  # the passes of these models make it exact
KINDS = [(each, None) for each in (PLAIN, SHARED, CYCLIC, TWO_GROUPS, WINDOWS, CYCLIC_WINDOWS)]
KINDS += [(each, MERGING) for each in (PLAIN, CYCLIC)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def measured(folder: Path, text: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["--model", str(folder), "--text", str(text), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("layer_types", "policy"), KINDS)
def test_all_ways_agree(
    layer_types, policy, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "model", layer_types, policy)
    sizes = [f"--context={CONTEXT}", "--stride=7", "--prefill-tolerance=0"]
    found = {
        way: measured(tmp_path / "model", text, capsys, *sizes, "--through", way)
        for way in ("forward", "cache", "tokens")
    }
    for way, values in found.items():
        assert values["loss"] == pytest.approx(found["tokens"]["loss"], abs=2e-5), way
        assert values["tokens"] == found["tokens"]["tokens"]
    assert found["forward"]["passes"] == (12 if layer_types in (CYCLIC, TWO_GROUPS, CYCLIC_WINDOWS) else None)
    merges = (found["forward"]["compression_ratio"] or 1.0) > 1.1
    assert merges == (policy is not None)
    # Not the same: caches are looked at a batch at a time, of which the engine may have computed the texts
    # one after the other.
    for way in ("cache", "tokens"):
        ratio = found[way]["compression_ratio"]
        assert ratio == pytest.approx(found["forward"]["compression_ratio"] or 1.0, rel=0.1), way


def test_it_is_that_of_the_logits(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "model", begins=True, context=256)
    model, tokenizer = load_model(tmp_path / "model")
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.item()
    found = measured(tmp_path / "model", text, capsys)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(
        expected * (tokens.numel() - 1) / math.log(2) / len(TEXT), rel=1e-5
    )
    assert (found["tokens"], found["bytes"], found["texts"], found["windows"]) == (
        tokens.numel() - 1,
        len(TEXT),
        1,
        1,
    )


def test_what_a_file_holds_can_be_said(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "model", context=256)
    lines = tmp_path / "lines.txt"
    lines.write_text(json.dumps({"text": text.read_text()}) + "\n")
    assert main(["--model", str(tmp_path / "model"), "--text", str(lines)]) == 2
    assert "say --text-format jsonl or text" in capsys.readouterr().err
    said = measured(tmp_path / "model", lines, capsys, "--text-format", "jsonl")
    assert said["bytes"] == measured(tmp_path / "model", text, capsys)["bytes"]


def test_windows_of_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(tmp_path / "model", PLAIN, MERGING)
    lines = [{"text": TEXT[:12]}, {"text": TEXT[20:80]}, {"text": ""}, {"text": TEXT}]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    sizes = ["--context", "9", "--stride", "4"]
    model, tokenizer = load_model(tmp_path / "model")
    nats, predicted, tokens = 0.0, 0, 40
    for line in lines:
        ids = tokenizer(line["text"]).input_ids[: tokens - predicted + 1]
        done = 1
        while done < len(ids):
            end = min(len(ids), 10 if done == 1 else done + 4)
            part = torch.tensor([ids[max(0, end - 10) : end]])
            with torch.no_grad():
                logprobs = model(part[:, :-1], use_cache=False).logits.double().log_softmax(-1)[0]
            nats -= logprobs[range(len(logprobs)), part[0, 1:]][-(end - done) :].sum().item()
            done = end
        predicted += max(0, len(ids) - 1)
    found = measured(tmp_path / "model", path, capsys, *sizes, "--max-tokens", "40", "--batch-size", "3")
    assert found["tokens"] == predicted == 40
    assert found["loss"] == pytest.approx(nats / predicted, abs=1e-5)
    monkeypatch.setattr(chunk_size, "CHUNK_BYTES", 2800)
    again = measured(tmp_path / "model", path, capsys, *sizes, "--max-tokens", "40", "--batch-size", "1")
    assert again["loss"] == pytest.approx(found["loss"], abs=1e-6)
    assert again["compression_ratio"] == pytest.approx(found["compression_ratio"])


def test_rows(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "model", begins=True)
    model, tokenizer = load_model(tmp_path / "model")
    rows = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids[:27]).view(3, 9)
    with torch.no_grad():
        expected = model(rows, labels=rows).loss.item()
    for way in ("forward", "tokens", "transformers"):
        found = measured(
            tmp_path / "model", text, capsys, "--rows", "3", "--row-length", "9", "--through", way
        )
        assert found["loss"] == pytest.approx(expected, abs=1e-5), way
        assert (found["tokens"], found["windows"]) == (24, 3)
        assert found["bytes"] == sum(len(tokenizer.decode(row[1:])) for row in rows)


def test_transformers_own_class(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path)  # for its tokenizer
    sizes = {"n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes)).eval()
    model.save_pretrained(tmp_path)
    ids = load_tokenizer(tmp_path)(TEXT).input_ids
    nats = 0.0
    for window in Text(ids, len(TEXT)).windows(20, 20):
        with torch.no_grad():
            logprobs = model(torch.tensor([window.tokens[:-1]])).logits[0].log_softmax(-1)
        nats -= logprobs[range(len(logprobs)), window.tokens[1:]][-window.predicted :].sum().item()
    found = measured(tmp_path, text, capsys, "--through", "transformers")
    assert (found["context"], found["tokens"]) == (20, len(ids) - 1)
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    (tmp_path / "model.safetensors").unlink()
    assert main(["--model", str(tmp_path), "--text", str(text), "--through", "transformers"]) == 2


def test_a_loss_that_is_not_finite(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_folder(tmp_path)
    model.lm_head.weight.data.fill_(3e38)  # finite, but logits are not
    model.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--text", str(text)]) == 1
    assert "the loss is nan; are the model's weights and --dtype right?" in capfd.readouterr().err


def test_what_is_printed(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "model", CYCLIC, MERGING)
    options = ["--model", str(tmp_path / "model"), "--text", str(text), "--passes", "4", "--context", "20"]
    assert main([*options, "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"perplexity {found['perplexity']:.4f} ({found['loss']:.6f} nats per token, ")
    assert "windows of up to 20" in first
    assert second == f"{found['compression_ratio']:.2f} tokens per slot of the KV cache"
    assert third == "4 passes over the layers that iterate"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "65"], "--context is 65; it must be at most 64, the model's context"),
        (
            ["--rows", "0", "--row-length", "9"],
            "--rows is 0 and --row-length is 9; they must be at least 1 and 2",
        ),
        (
            ["--rows", "3"],
            "--rows is 3 and --row-length is None; they must be at least 1 and 2, and both be given",
        ),
        (
            ["--rows", "1", "--row-length", "66"],
            "--row-length - 1 is 65; it must be at most 64, the model's context",
        ),
        (
            ["--rows", "1", "--row-length", "9", "--stride", "2"],
            "--rows and --row-length are given beside --context",
        ),
        (
            ["--rows", "90", "--row-length", "9"],
            "rows of 9 tokens; 90 are needed. Give a longer text, or fewer or shorter",
        ),
        (["--context", "8", "--stride", "9"], "--stride is 9; it must be at most --context, 8"),
        (["--through", "cache", "--passes", "3"], "--passes is for --through forward"),
        (["--text", "nowhere.txt"], "input 'nowhere.txt' stands for no file"),
        (["--text", "{empty}"], "the files hold nothing to predict"),
        (["--model", "nowhere"], "--model nowhere is not a Hugging Face folder: it has no config.json"),
        (["--device", "toaster"], "toaster"),
        (["--through", "cache", "--memory", "1KiB"], "the cache cannot be made: memory_bytes is 1024"),
    ],
)
def test_bad_input(
    options: list[str], said: str, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "model")
    (tmp_path / "empty.txt").write_text("")
    given = [each.format(empty=tmp_path / "empty.txt") for each in options]
    assert main(["--model", str(tmp_path / "model"), "--text", str(text), *given]) == 2
    assert said in capfd.readouterr().err


def test_folders_need_one_process_and_a_tokenizer(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--text", str(text)]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    assert main(arguments) == 2
    assert "has no tokenizer; put its files into the folder" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    assert "--model runs on one process; start it without torchrun" in capfd.readouterr().err


VOCABULARY = 320


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, tokenizer.model and checkpoints of a run (run/)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "text.txt").write_text("".join(TEXTS))
    train_sentencepiece(folder / "tokenizer.model", VOCABULARY)
    run = tiny_run(
        compression={"layer_types": "0s_1s_2_2", "sliding_window": 8},
        model={"vocab_size": VOCABULARY},
        checkpoint={"save": str(folder / "run")},
        train={"train_iters": 3},
    )
    run_on_ranks(1, train, run)
    return folder


def of_run(folder: str, output: str, *options: str) -> int:
    tokenizer = ("--tokenizer_type=sentencepiece", f"--tokenizer_model={folder}/tokenizer.model")
    return main(
        [f"--load={folder}/run", f"--text={folder}/text.txt", f"--output={output}", *tokenizer, *options]
    )


def test_every_layout_of_a_checkpoint_gives_the_same(checkpoints: Path, tmp_path: Path) -> None:
    found = {}
    for name, ranks, tp, pp in [("one", 1, 1, 1), ("tp", 2, 2, 1), ("pp", 2, 1, 2), ("dp", 2, 1, 1)]:
        output, layout = (
            tmp_path / name,
            (f"--tensor_model_parallel_size={tp}", f"--pipeline_model_parallel_size={pp}"),
        )
        options = ("--context=8", "--stride=5", "--max-tokens=24", *layout)
        assert run_on_ranks(ranks, of_run, str(checkpoints), str(output), *options) == [0] * ranks
        found[name] = json.loads(output.read_text())
    assert (found["one"]["tokens"], found["one"]["windows"]) == (24, 5)
    assert 1 < found["one"]["perplexity"] < 10 * VOCABULARY
    for name, values in found.items():
        assert values["loss"] == pytest.approx(found["one"]["loss"], abs=2e-6), name


def test_checkpoints_run_forward_only(
    checkpoints: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for options in (["--through", "cache"], ["--passes", "3"]):
        assert of_run(str(checkpoints), str(tmp_path / "out"), *options) == 2
        assert (
            "--through and --passes are for --model; convert the checkpoint, or leave them out"
            in capfd.readouterr().err
        )

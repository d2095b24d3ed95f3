"""lm-eval through the engine: scores are those of the logits, tasks run offline, and what cannot work is
named."""

import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.loading import load_model
from lckv.generation.sampling import SamplingParams
from lckv_megatron.commands import evaluate as evaluate_program
from lckv_megatron.commands.evaluate import main
from lckv_megatron.scoring.lm_eval_adapter import adapter, sampling_params
from lckv_megatron.scoring.score_table import column_names
from megatron_ext.errors import ConfigError
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import CYCLIC, MERGING

CHOICES: dict[str, Any] = {
    "task": "tiny_choices",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXTS: dict[str, Any] = {
    "task": "tiny_texts",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
ANSWERS: dict[str, Any] = {
    "task": "tiny_answers",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
DOCUMENTS = [
    {
        "question": f"document {number} of the",
        "choices": [" corpus", " hello world", " word"],
        "answer": number % 3,
    }
    for number in range(6)
]
DOCUMENTS[0]["question"] += " word" * 200  # longer than the context


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, and nothing else that lm-eval and its data sets could reach."""
    for name, value in {
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    files = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(tmp_path / "data")}
    for task in (CHOICES, TEXTS, ANSWERS):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, "dataset_kwargs": files}))
    return folder


def loglikelihood(model: Any, tokens: list[int], predicted: int) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0, -predicted:].double()
    wanted = torch.tensor(tokens[-predicted:])
    return logits.log_softmax(-1)[range(predicted), wanted].sum().item(), bool(
        (logits.argmax(-1) == wanted).all()
    )


def test_tasks_run_with_the_compressed_cache(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "model", CYCLIC, MERGING)
    names = "tiny_choices,tiny_texts,tiny_answers"
    options = [
        "--model",
        str(tmp_path / "model"),
        "--tasks",
        names,
        "--include-path",
        str(tasks),
        "--limit",
        "4",
    ]
    assert main([*options, "--output", str(tmp_path / "scores.json")]) == 0
    shown = capsys.readouterr().out
    assert all(f"|{name}" in shown.replace(" ", "") for name in names.split(","))
    assert shown.startswith("| task ") and " \u00b1 0." in shown
    assert "tokens per slot measured" in shown
    found = json.loads((tmp_path / "scores.json").read_text())
    assert 0 <= found["results"]["tiny_choices"]["acc,none"] <= 1
    assert found["results"]["tiny_texts"]["bits_per_byte,none"] > 0
    assert found["n-samples"]["tiny_choices"]["effective"] == 4
    assert found["cache"]["compression_ratio"] > 1.1
    assert found["config"]["model"] == str(tmp_path / "model")
    assert "pretty_env_info" not in found


def test_models_are_compared_in_one_table(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, merged = tmp_path / "one" / "hf", tmp_path / "two" / "hf"
    save_folder(plain)
    save_folder(merged, CYCLIC, MERGING)
    alive: list[weakref.ref[Any]] = []
    loaded = evaluate_program.load

    def counted(options: Any, folder: Path) -> Any:
        assert not any(reference() for reference in alive), "the model before is still in memory"
        model, tokenizer = loaded(options, folder)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluate_program, "load", counted)
    output = tmp_path / "scores.json"
    given = ["--model", str(plain), str(merged), "--tasks", "tiny_choices", "--include-path", str(tasks)]
    assert main([*given, "--limit", "0.5", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, accuracy, bytes_per_token, compression = (
        next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if word in line)
        for word in ("| task", "| acc ", "| bytes per token", "| compression")
    )
    assert head[-2:] == ["one/hf", "two/hf"]
    models = json.loads(output.read_text())["models"]
    assert list(models) == ["one/hf", "two/hf"] and len(alive) == 2
    for cell, size, ratio, results in zip(
        accuracy[-2:], bytes_per_token[-2:], compression[-2:], models.values(), strict=True
    ):
        entry, cache = results["results"]["tiny_choices"], results["cache"]
        assert cell == f"{entry['acc,none']:.4f} \u00b1 {entry['acc_stderr,none']:.4f}"
        assert size == f"{cache['kv_bytes_per_token']:,.0f}"
        assert ratio == f"{cache['plain_kv_bytes_per_token'] / cache['kv_bytes_per_token']:.2f}x"
        assert results["n-samples"]["tiny_choices"]["effective"] == 3
    assert compression[-2] == "1.00x" != compression[-1]
    assert sum("tokens per slot measured" in line for line in lines) == 2


def test_what_is_measured_stays_where_a_later_model_fails(
    tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path / "good")
    save_folder(tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    output = tmp_path / "scores.json"
    folders = [str(tmp_path / name) for name in ("good", "bad")]
    given = ["--tasks", "tiny_choices", "--include-path", str(tasks), "--limit", "2", "--output", str(output)]
    assert main(["--model", *folders, *given]) == 2
    captured = capfd.readouterr()
    assert "| good" in captured.out and "bad" in captured.err
    assert list(json.loads(output.read_text())["models"]) == ["good"]
    output.unlink()
    (tmp_path / "bad" / "config.json").unlink()
    assert main(["--model", *folders, *given]) == 2
    assert not output.exists() and "| good" not in capfd.readouterr().out  # seen before the first is loaded


def test_columns_have_names_of_their_own() -> None:
    folders = [Path("/runs/a/hf"), Path("/runs/b/hf"), Path("/runs/c"), Path("/runs/c")]
    assert column_names(folders) == ["a/hf", "b/hf", "c", "c (2)"]


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "nan", "inf"])
def test_limits_are_counts_or_shares(limit: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "x", "--tasks", "y", f"--limit={limit}"])
    assert f"{limit} is neither a whole number of at least 1 nor a share" in capfd.readouterr().err


def test_scores_are_those_of_the_logits(tmp_path: Path) -> None:
    save_folder(tmp_path, begins=True, context=32)
    model, tokenizer = load_model(tmp_path)
    engine = Engine(model, EngineConfig(page_size=4, max_batch_size=3), tokenizer=tokenizer)
    lm = adapter(engine, tokenizer, max_length=20, batch_size=2)
    pairs = [
        ("hello", " world"),
        ("document", " 3 of the corpus: word"),
        ("", "hello world"),
        ("corpus" * 20, " word"),
    ]
    found = lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        whole = tokenizer(context + continuation).input_ids
        predicted = len(whole) - len(tokenizer(context).input_ids)
        expected = loglikelihood(model, whole[-21:], predicted)
        assert score == pytest.approx(expected[0], abs=2e-5)
        assert greedy == expected[1]
    likeliest = int(model(torch.tensor([tokenizer("hello").input_ids])).logits[0, -1].argmax())
    requests = [(("", ""), tokenizer("hello").input_ids, [likeliest])]
    assert lm._loglikelihood_tokens(requests, disable_tqdm=True)[0][1] is True


def test_long_texts_are_scored_in_windows(tmp_path: Path) -> None:
    save_folder(tmp_path, context=32)
    model, tokenizer = load_model(tmp_path)
    engine = Engine(model, tokenizer=tokenizer)
    lm = adapter(engine, tokenizer, max_length=8, batch_size=4, token_by_token=True)
    texts = ["hello world, document 7 of the corpus: word word", "word"]
    found = lm.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts], disable_tqdm=True)
    for text, score in zip(texts, found, strict=True):
        tokens = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
        expected, done = 0.0, 1
        while done < len(tokens):
            end = min(len(tokens), done + 8)
            expected += loglikelihood(model, tokens[max(0, end - 9) : end], end - done)[0]
            done = end
        assert score == pytest.approx(expected, abs=5e-5)


def test_answers_are_the_engines(tmp_path: Path) -> None:
    save_folder(tmp_path)
    model, tokenizer = load_model(tmp_path)
    engine = Engine(model, EngineConfig(max_batch_size=2, max_waiting=1), tokenizer=tokenizer)
    lm = adapter(engine, tokenizer, max_length=12, batch_size=2, seed=5)
    contexts = ["hello world", "the corpus: " * 9, "document"]
    settings = {"until": "\n", "max_gen_toks": 6, "do_sample": True, "temperature": 0.8, "top_k": 20}
    found = lm.generate_until(
        [SimpleNamespace(args=(context, settings)) for context in contexts], disable_tqdm=True
    )
    for number, (context, answer) in enumerate(zip(contexts, found, strict=True)):
        prompt = tokenizer(context).input_ids[-6:]
        params = SamplingParams(0.8, top_k=20, max_new_tokens=6, stop=("\n",), seed=5 + number)
        assert answer == engine.generate([prompt], params)[0].text
    with pytest.raises(ConfigError, match="a task asks for 12 new tokens, but the model's context is 12"):
        lm.generate_until([SimpleNamespace(args=("hello", {"max_gen_toks": 12}))], disable_tqdm=True)


def test_answers_end_before_a_stop_text_with_a_special_token(tmp_path: Path) -> None:
    save_folder(tmp_path)
    model, tokenizer = load_model(tmp_path)
    model.lm_head.weight.data.zero_()  # all are as probable, and the first one comes: the end token
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    special = tokenizer.convert_ids_to_tokens(0)
    assert tokenizer.decode([0, 0]) == special * 2 and tokenizer.decode([0], skip_special_tokens=True) == ""
    lm = adapter(Engine(model, tokenizer=tokenizer), tokenizer, max_length=12, batch_size=2)
    request = SimpleNamespace(args=("hello", {"until": [special * 2], "max_gen_toks": 6}))
    assert lm.generate_until([request], disable_tqdm=True) == [""]
    assert lm._engine.stats().generated_tokens == 2


def test_chats_and_special_tokens(tmp_path: Path) -> None:
    save_folder(tmp_path, begins=True, chat=True)
    model, tokenizer = load_model(tmp_path)
    lm = adapter(
        Engine(model, tokenizer=tokenizer),
        tokenizer,
        max_length=8,
        batch_size=4,
        token_by_token=False,
        seed=0,
    )
    history = [{"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(history) == "[user] hello\n[assistant] "
    assert lm.chat_template(True) == tokenizer.chat_template
    assert (lm.eot_token_id, lm.prefix_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    with pytest.raises(ConfigError, match=r"a text of a task: character 1 is U\+D800, half of a surrogate"):
        lm.tok_encode("a\ud800")
    assert lm.tok_encode("hello") == lm.tok_encode("<|begin|>hello") == [1, *lm.tok_encode("hello", False)]


def test_settings_of_generation_tasks() -> None:
    assert sampling_params({"until": ["a", "b"], "max_gen_toks": 7, "num_beams": 1}, 3) == SamplingParams(
        0.0, max_new_tokens=7, stop=("a", "b"), seed=3
    )
    assert sampling_params({"do_sample": False, "temperature": 0.7}, 0).temperature == 0
    assert sampling_params({"temperature": 0.7, "top_p": 0.9, "top_k": 0}, 0) == SamplingParams(
        0.7, top_p=0.9, max_new_tokens=256, seed=0
    )
    assert sampling_params({"do_sample": True}, 0).temperature == 1
    assert sampling_params({"do_sample": True, "temperature": None}, 0).temperature == 1
    assert sampling_params({}, 0).temperature == 0
    assert sampling_params({"until": None, "max_gen_toks": None}, 0) == SamplingParams(
        0.0, max_new_tokens=256, seed=0
    )
    with pytest.raises(
        ConfigError, match=r"generation_kwargs\.num_beams is 4; the engine has nothing of the kind"
    ):
        sampling_params({"num_beams": 4}, 0)
    with pytest.raises(ConfigError, match=r"generation_kwargs: top_p is 2\.0"):
        sampling_params({"top_p": 2.0}, 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"do_sample": True, "temperature": 0.0},
            r"do_sample is true and temperature is 0\.0; set do_sample",
        ),
        ({"do_sample": "yes"}, r"generation_kwargs\.do_sample is 'yes'; it must be true or false"),
        ({"temperature": "hot"}, "generation_kwargs: temperature is 'hot'; it must be"),
        ({"max_gen_toks": 5.5}, r"generation_kwargs: max_gen_toks is 5\.5; it must be an integer"),
        (
            {"max_gen_toks": 5, "max_new_tokens": 6},
            "max_gen_toks is 5 and max_new_tokens is 6; give one of them",
        ),
        ({"until": ["a", 7]}, "generation_kwargs: until is"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0; the engine has nothing of the kind"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampling_params(settings, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--include-path", "nowhere"], "--include-path nowhere is no folder"),
        (["--model", "nowhere"], "nowhere/config.json does not exist"),
    ],
)
def test_bad_input(options: list[str], said: str, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(tasks), "--tasks", "tiny_choices", "--include-path", str(tasks)]
    assert main([*given, *options]) == 2
    assert said in capfd.readouterr().err


def test_unknown_tasks_are_named(
    monkeypatch: pytest.MonkeyPatch, tasks: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    made = TaskManager.__init__
    # Reading the thousands of tasks that come with lm-eval takes long.
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: made(self, **{**given, "include_defaults": False})
    )
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert main(["--model", str(tmp_path), "--tasks", "tiny_choice", "--include-path", str(tasks)]) == 2
    assert (
        "'tiny_choice' is no task, group or pattern that lm-eval knows. Did you mean tiny_choices"
        in capfd.readouterr().err
    )


def test_it_says_that_lm_eval_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert main(["--model", str(tmp_path), "--tasks", "x"]) == 2
    assert "lm-eval is not installed" in capfd.readouterr().err

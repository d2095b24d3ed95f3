"""What programs load before they answer: nothing that takes seconds for --help and for a path that is wrong.

All programs run one after the other in one process, which nothing large may ever have entered.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lckv_megatron.__main__ import program_names

ROOT = Path(__file__).resolve().parents[2]
_CODE = """
import contextlib, io, json, sys
from lckv_megatron.__main__ import main as programs
from pretrain_lckv import main as training

LARGE = {"torch", "transformers", "megatron.core", "matplotlib", "lm_eval", "scipy", "safetensors"}
for line in sys.stdin:
    words, text = json.loads(line), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = training(words[1:]) if words[0] == "pretrain_lckv" else programs(words)
        except SystemExit as ended:
            status = ended.code
    large = sorted(LARGE & set(sys.modules))
    print(json.dumps([status, text.getvalue(), large]))
    if large:
        break
"""


@dataclass(frozen=True)
class Answer:
    """What a program said, and what was loaded then."""

    command: str
    status: int
    text: str
    large: list[str]


def ask(commands: Sequence[Sequence[str]]) -> list[Answer]:
    """The answers, until the first program that has loaded something large."""
    lines = "".join(json.dumps(words) + "\n" for words in commands)
    command = [sys.executable, "-c", _CODE]
    result = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    said = map(json.loads, result.stdout.splitlines())
    return [Answer(" ".join(words), *answer) for words, answer in zip(commands, said, strict=False)]


def test_help_loads_nothing_large() -> None:
    conversions = ("hf-to-megatron", "megatron-to-hf", "legacy-to-megatron", "verify", "inspect")
    names = [*([name] for name in program_names()), *(["convert", name] for name in conversions)]
    answers = ask([[*words, "--help"] for words in (*names, ["pretrain_lckv"])])
    for answer in answers:
        assert (answer.command, answer.large, answer.status) == (answer.command, [], 0)
        assert "usage:" in answer.text
    assert len(answers) == len(names) + 1


WRONG = {
    "convert hf-to-megatron --hf-path {no} --megatron-path {new}": "{no} is not a folder that exists",
    "convert hf-to-megatron --hf-path {empty} --megatron-path {full}": "{full} is not empty",
    "convert hf-to-megatron --hf-path {run} --megatron-path {new}": "{run} is a folder of this project's",
    "convert megatron-to-hf --megatron-path {no} --hf-path {new}": "{no} is not a directory that exists",
    "convert megatron-to-hf --megatron-path {empty} --hf-path {new} --tokenizer {no}": "--tokenizer {no}",
    "convert legacy-to-megatron --legacy-path {no} --megatron-path {new}": "{no} does not exist",
    "convert legacy-to-megatron --legacy-path {hf} --megatron-path {new}": "{hf} is a model in Hugging",
    "convert verify --hf-path {no} --megatron-path {no}": "{no} is not a directory that exists",
    "convert verify --hf-path {no} --megatron-path {no} --tokens {no}": "--tokens {no} cannot be read",
    "convert inspect {no}": "{no} is not a folder that exists",
    "dump-logits --load {no} --tokens {file} --output {new}": "{no} is not a directory that exists",
    "dump-logits --load {empty} --tokens {no} --output {new}": "--tokens {no} cannot be read",
    "evaluate --tasks t --model {no}": "{no}/config.json does not exist",
    "evaluate --tasks t --model {hf} {no}": "{no}/config.json does not exist",
    "evaluate --tasks t --model {hf} --include-path {no}": "--include-path {no} is no folder",
    "evaluate --tasks t --model {empty} --output {no}/a": "--output {no}/a: the folder {no} does not exist",
    "generate --model {no} --prompt a": "{no}/config.json does not exist",
    "generate --model {run} --prompt a": "{run} is a folder of this project's checkpoints",
    "generate --model {empty} --batch {no}": "--batch {no} cannot be read",
    "gguf-to-hf {no} {new}": "{no} cannot be read",
    "kv-memory --memory 1GiB --model {no}": "{no} is not a Hugging Face folder",
    "perplexity --text {file} --model {no}": "--model {no} is not a Hugging Face folder",
    "perplexity --text {no} --model {empty}": "{no}' stands for no file",
    "perplexity --text {file} --load {no}": "{no} is not a directory that exists",
    "plan --config {no}": "{no}",
    "plot {no}": "{no} cannot be read",
    "preprocess --input {no} --output-prefix {new} --tokenizer-type tiktoken --tokenizer-model a": "{no}",
    "pretrain_lckv --config {no}": "{no}",
    "sample --load {no} --prompt a": "{no} is not a directory that exists",
    "serve --model {no}": "{no}/config.json does not exist",
    "train-tokenizer --input {no} --output {new} --vocab-size 300": "{no}' stands for no file",
}


def test_a_wrong_path_is_said_before_anything_large_is_loaded(tmp_path: Path) -> None:
    for name in ("empty", "full/folder", "hf", "run/iter_0000001"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file.txt", "hf/config.json", "run/iter_0000001/manifest.json"):
        (tmp_path / name).write_text("a text\n")
    names = {"no": "no", "empty": "empty", "full": "full", "new": "new", "file": "file.txt"}
    paths = {name: str(tmp_path / place) for name, place in {**names, "hf": "hf", "run": "run"}.items()}
    commands = [[word.format(**paths) for word in command.split()] for command in WRONG]
    answers = ask(commands)
    for answer, wanted in zip(answers, WRONG.values(), strict=False):
        assert (answer.command, answer.large, answer.status) == (answer.command, [], 2), answer.text
        assert wanted.format(**paths) in answer.text, answer.command
    assert len(answers) == len(WRONG)


def test_looking_at_a_model_loads_neither_megatron_nor_transformers() -> None:
    modules = ("checkpoints_conversion.inspection", "checkpoints_conversion.formats.megatron")
    code = f"import sys, {', '.join(modules)}; print({{'megatron.core', 'transformers'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (result.stdout, result.returncode) == ("set()\n", 0), result.stderr

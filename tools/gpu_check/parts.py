"""The parts of the check, each a function of the commands and a folder; they return figures."""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_check.commands import ROOT, CommandError, Commands
from tools.gpu_check.inputs import Sizes, compressions, write_corpus, write_run, write_tokenizer

Figures = dict[str, Any]

_WARNING_SYNC = (
    "import runpy, sys, torch; torch.cuda.is_available() and torch.cuda.set_sync_debug_mode('warn'); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@dataclass(frozen=True)
class Check:
    """What all parts share."""

    commands: Commands
    folder: Path
    sizes: Sizes
    tiny: bool

    @property
    def maps(self) -> tuple[str, ...]:
        """Which models are trained."""
        return ("lckv",) if self.tiny else tuple(compressions())


def doctor(check: Check) -> Figures:
    """What the machine has."""
    said = check.commands.program("doctor", "--json", limit=90)
    report: Figures = json.loads(said[said.index("{") :])
    return {"facts": report["found"], "paths": report["paths"]}


def gpu_tests(check: Check) -> Figures:
    """`pytest -m gpu`: with --tiny only that they are collected."""
    options = ["--collect-only"] if check.tiny else ["-x"]
    where = [ROOT / "tests" / "lckv" / "policies"] if check.tiny else []
    said = check.commands.python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *options, *where, limit=200
    )
    return {"last line": said.strip().splitlines()[-1]}


def training(check: Check) -> Figures:
    """Each kind of map in bfloat16 with packed documents: six steps, and the last three again from the
    checkpoint of the third, which must be the same to the bit."""
    write_tokenizer(check.folder / "tokenizer")
    write_corpus(check.folder / "corpus.jsonl", check.sizes.documents)
    check.commands.program(
        "preprocess", "--input", check.folder / "corpus.jsonl", "--output-prefix", check.folder / "corpus",
        "--tokenizer-type", "huggingface", "--tokenizer-model", check.folder / "tokenizer",
    )  # fmt: skip
    return {name: _train_and_resume(check, name) for name in check.maps}


def _train_and_resume(check: Check, name: str) -> Figures:
    settings, again = check.folder / f"{name}.yaml", check.folder / f"{name}_again"
    write_run(settings, name, check.sizes, check.folder)
    run = (ROOT / "pretrain_lckv.py", "--config", settings)
    check.commands.python(*run)
    check.commands.python(
        *run, f"--checkpoint.load={check.folder / name / 'iter_0000003'}", f"--checkpoint.save={again}",
        f"--logging.metrics_file={again}.jsonl",
    )  # fmt: skip
    whole, rest = (_losses(file) for file in (check.folder / f"{name}.jsonl", Path(f"{again}.jsonl")))
    if whole[3:] != rest:
        raise CommandError(f"{name}: losses {whole[3:]} after resuming are {rest}")
    return {"losses": whole, "resumed": "equal to the bit"}


def _losses(metrics: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]


def synchronisations(check: Check) -> Figures:
    """Where a step waits for the GPU: PyTorch's warnings, by the line that caused them."""
    said = check.commands.python(
        "-W", "always", "-c", _WARNING_SYNC, ROOT / "pretrain_lckv.py",
        "--config", check.folder / "lckv.yaml",
        f"--checkpoint.save={check.folder / 'sync'}", "--train.deterministic=false",
        f"--logging.metrics_file={check.folder / 'sync.jsonl'}",
    )  # fmt: skip
    lines: dict[str, int] = {}
    for line in said.splitlines():
        if "called a synchronizing CUDA operation" in line:
            place = line.partition(" UserWarning")[0].replace(f"{ROOT}/", "")
            lines[place] = lines.get(place, 0) + 1
    return {"warnings": lines}


def recipe(check: Check) -> Figures:
    """Three steps of the 1B recipe on one GPU: time, share of the peak, memory, beside what the plan says."""
    options = [
        "--train.train_iters=5", "--train.global_batch_size=8", "--optimizer.lr_warmup_iters=2",
        "--train.eval_interval=0", "--data.mock=true", "--data.data_path=[]", "--data.tokenizer_type=none",
        "--data.tokenizer_model=null", "--data.reset_attention_mask=false", "--data.reset_position_ids=false",
        "--checkpoint.save=null", "--checkpoint.save_interval=0", "--logging.log_interval=1",
        "--logging.tensorboard_dir=null",
        f"--logging.metrics_file={check.folder / 'recipe.jsonl'}",
    ]  # fmt: skip
    if check.tiny:
        options += [
            "--model.hidden_size=64", "--model.num_attention_heads=4", "--model.num_query_groups=2",
            "--model.ffn_hidden_size=128", "--model.vocab_size=512", "--train.seq_length=32",
        ]  # fmt: skip
    config: list[str | Path] = ["--config", ROOT / "examples" / "llama_1b_lckv" / "pretrain.yaml"]
    planned = check.commands.program("plan", *config, "--world-size", "1", *options)
    check.commands.python(ROOT / "pretrain_lckv.py", *config, *options, limit=150)
    lines = (check.folder / "recipe.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][2:]  # the first ones compile and warm up
    names = ("iteration_seconds", "tokens_per_second", "model_tflops_per_device", "mfu", "hfu")
    figures = {name: statistics.median(step[name] for step in steps) for name in names if name in steps[0]}
    figures["peak_memory_bytes"] = max(step["peak_memory_bytes"] for step in steps)
    return {**figures, "plan": planned.splitlines()}


def generation(check: Check) -> Figures:
    """The models that were trained, converted with a proof although TF32 is asked for, answer a prompt."""
    return {name: _generate(check, name) for name in check.maps if name != "yoco"}


def _generate(check: Check, name: str) -> Figures:
    model = check.folder / f"{name}_hf"
    proof = check.commands.program(
        "convert", "megatron-to-hf", "--megatron-path", check.folder / name, "--hf-path", model,
        "--verify", "always", TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1",
    )  # fmt: skip
    answer = check.commands.program(
        "generate", "--model", model, "--prompt", "w1 w3 w5 w7", "--max-new-tokens", "64",
        "--temperature", "0", "--ignore-eos", "--json",
    )  # fmt: skip
    return {"proof": proof.strip().splitlines()[-6:], "generation": answer.strip().splitlines()[-6:]}


def decoding(check: Check) -> Figures:
    """The benchmark of generation, in bfloat16."""
    sizes = ["--layers", "6", "--hidden-size", "64", "--heads", "4", "--kv-heads", "2", "--lengths", "32"]
    if not check.tiny:
        sizes = ["--layers", "22", "--hidden-size", "2048", "--heads", "32", "--kv-heads", "4"]
    rows = check.folder / "inference.csv"
    check.commands.python(
        "-m", "tools.benchmarks.inference", *sizes, "--context", "64" if check.tiny else "1024",
        "--output", rows, limit=150,
    )  # fmt: skip
    return {"rows": rows.read_text(encoding="utf-8").splitlines()}


PARTS: tuple[Callable[[Check], Figures], ...] = (
    doctor, gpu_tests, training, synchronisations, recipe, generation, decoding,
)  # fmt: skip
"""The most valuable first."""


def versions() -> Figures:
    """Of what the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "megatron-core", "triton", "transformer-engine", "flash-attn", "transformers")
    known: Figures = {"python": sys.version.split()[0]}
    for name in names:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            known[name] = None
    return known

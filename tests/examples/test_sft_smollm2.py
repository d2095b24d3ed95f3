"""The example of supervised fine-tuning, from its first command to its last, on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lckv.families.tiny_models import saved_model
from tests.megatron_ext.data.builders import CHATML, save_tokenizer
from tests.pages.stand_ins import stand_ins

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "sft_smollm2"


def run_example(folder: Path, *options: str, timeout: float = 550) -> str:
    """What the script says; its ten programs start warm."""
    with stand_ins(folder.with_name("programs"), hub=folder.with_name("hub")) as environment:
        result = subprocess.run(
            ["bash", str(EXAMPLE / "run.sh"), str(folder), *options],
            env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def losses_in(said: str, name: str) -> tuple[float, float]:
    """The first and the last one, as the judge prints them."""
    match = re.search(rf"^{name} +([\d.]+) -> ([\d.]+)$", said, re.MULTILINE)
    assert match is not None
    return float(match[1]), float(match[2])


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_whole_way(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "model", CHATML)
    saved_model(model, "llama", vocab_size=258, max_position_embeddings=512, eos_token_id=256)
    settings = ["--train.train_iters", "6", "--train.eval_interval", "2", "--optimizer.lr", "0.01"]
    said = run_example(tmp_path / "run", "--model", str(model), "--", *settings)
    first, last = losses_in(said, "lm_loss")
    assert last < first - 0.1
    assert re.search(r"^before  of 20 answers \d+ are JSON, \d+ are right$", said, re.MULTILINE)
    assert (tmp_path / "run" / "tuned" / "chat_template.jinja").read_text() == CHATML


def test_its_conversations(tmp_path: Path) -> None:
    """They are the same each time; no question is in them; answers are JSON."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, str(EXAMPLE / "chats.py"), str(tmp_path / name)], check=True)
    files = [{path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]
    chats = [json.loads(line)["messages"] for line in files[0]["chats.jsonl"].splitlines()]
    asked = {message["content"] for chat in chats for message in chat if message["role"] == "user"}
    questions = [json.loads(line) for line in files[0]["questions.jsonl"].splitlines()]
    assert (len(chats), len(questions)) == (400, 20)
    assert not asked & {question["messages"][0]["content"] for question in questions}
    said = [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
    assert all(json.loads(text).keys() == {"answer"} for text in [*said, *(q["id"] for q in questions)])

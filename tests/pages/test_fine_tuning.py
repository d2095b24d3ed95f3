"""docs/fine_tuning.md: its code runs on a tiny exported model, and what it saves is the model."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.megatron_ext.data.builders import save_tokenizer
from tests.pages.blocks import blocks_of, commands_outside_bash, substituted
from tests.pages.stand_ins import stand_ins
from tests.thinning import thinned

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fine_tuning.md"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MODELS: dict[str, dict[str, Any]] = {
    "yoco": {"layer_types": "0_1_1"},
    "dmc": {
        "layer_types": "0_1_1",
        "policy": {"name": "dmc", "stage": "finetune", "initial_decision_bias": 0.1, "window": 4},
    },
}
TOKENS = torch.arange(40)[None] % 31
ALONE = """
import sys
sys.modules["lckv"] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
torch.save(model(torch.arange(40)[None] % 31, use_cache=False).logits, sys.argv[2])
"""


@pytest.fixture(scope="module", params=thinned(MODELS, 2))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out/model`, as our exporter writes it, and `chats.jsonl`."""
    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    config = LCKVLlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=256,
        compression=MODELS[request.param],
    )
    LCKVLlamaForCausalLM(config).save_pretrained(save_tokenizer(place / "source", TEMPLATE))
    hf_to_megatron(str(place / "source"), place / "megatron", proof="never")
    megatron_to_hf(place / "megatron", place / "out" / "model", proof="never")
    chats = [
        [{"role": "user", "content": "abc" * n}, {"role": "assistant", "content": "yes" * n}]
        for n in (1, 2, 3)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 8))
    return place


def run_code(index: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a block of Python of the page in `folder`. Returns its names."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[index]
    code = code.replace("max_length=1024", "max_length=1024, use_cpu=True, bf16=False")  # as the page says
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval().float()(TOKENS, use_cache=False).logits


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def assert_learned(trainer: Any, folder: Path) -> None:
    assert trainer.state.global_step == 9
    assert 0 < trainer.state.log_history[-1]["train_loss"] < 10
    assert not torch.equal(logits_of(loaded(folder / "out" / "model")), logits_of(trainer.model))


REPLACED = {
    "--nproc-per-node 8": "--nproc-per-node 1",
    "--config sft.yaml": f"--config {PAGE.parents[1] / 'examples/sft_smollm2/sft.yaml'} --config tiny.yaml",
}
"""What a cluster has, and what the test has."""
TINY = {"train": {"train_iters": 4, "seq_length": 64, "eval_interval": 0, "micro_batch_size": 1}}


@pytest.mark.timeout(600)
def test_the_commands_of_the_page(folder: Path, tmp_path: Path) -> None:
    """From conversations to a checkpoint of Megatron's."""
    (block,) = [block for block in blocks_of(PAGE) if commands_outside_bash(block)]
    text, used = substituted(block.text, REPLACED)
    assert used == set(REPLACED)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    (folder / "pretrain_lckv.py").symlink_to(PAGE.parents[1] / "pretrain_lckv.py")
    (folder / "data").mkdir()
    with stand_ins(tmp_path, hub=tmp_path) as environment:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=550,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration 4/4" in done.stderr


def test_sft_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run_code(0, folder, monkeypatch)["trainer"]
    assert_learned(trainer, folder)
    tuned = loaded(folder / "out" / "tuned")
    torch.testing.assert_close(logits_of(tuned), logits_of(trainer.model))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    labels = batch["labels"][0]
    assert trainer.processing_class.decode(labels[labels >= 0]) == "yes<|end|>"


def test_lora(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    names = run_code(1, folder, monkeypatch)
    expected = logits_of(names["merged"])
    assert not torch.equal(expected, logits_of(loaded(folder / "out" / "model")))
    adapted = PeftModel.from_pretrained(loaded(folder / "out" / "model"), folder / "out" / "adapter")
    torch.testing.assert_close(logits_of(adapted), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(loaded(folder / "out" / "merged")), expected)
    command = [sys.executable, "-c", ALONE, str(folder / "out" / "merged"), str(folder / "logits.pt")]
    subprocess.run(command, check=True, cwd=folder, timeout=250)
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected)
    hf_to_megatron(str(folder / "out" / "merged"), folder / "back", proof="never")
    megatron_to_hf(folder / "back", folder / "again", proof="never")
    assert torch.equal(logits_of(loaded(folder / "again")), logits_of(loaded(folder / "out" / "merged")))

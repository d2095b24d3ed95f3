"""The loss on packed conversations is that of a Hugging Face model on each conversation alone."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lckv.models  # noqa: F401  transformers' Auto classes know the models
from checkpoints_conversion.convert import megatron_to_hf
from megatron_ext.config import RunConfig
from megatron_ext.data.datasets import build_datasets
from tests.megatron_ext.data.builders import random_chats, write_chats
from tests.megatron_ext.training.runs import logged_to, series, train
from tests.megatron_ext.training.test_chat import COMPRESSIONS, chat_run
from tests.ranks import run_on_ranks

CHATS = random_chats(30)


def rows_of(run: RunConfig) -> int:
    """Rows that the conversations take."""
    samples = build_datasets(
        run.data, seq_length=run.train.seq_length, num_samples=(0, None, 0), seed=run.train.seed,
        vocab_size=97, eod=None,
    ).valid  # fmt: skip
    assert samples is not None
    return len(samples)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_packed_is_as_alone(name: str, tmp_path: Path) -> None:
    prefix = write_chats(tmp_path / "chats", CHATS, vocab_size=97)
    data = {"data_path": [], "split": "1,0,0", "train_data_path": [prefix], "valid_data_path": [prefix]}
    rows = rows_of(chat_run(prefix, data=data))
    training = {"train_iters": 3, "global_batch_size": 1, "eval_interval": 3, "eval_iters": rows}
    saving = {"save": str(tmp_path / "run")}
    run = logged_to(
        chat_run(prefix, name, data=data, train=training, checkpoint=saving), tmp_path / "log.jsonl"
    )
    run_on_ranks(1, train, run)
    megatron_to_hf(tmp_path / "run", tmp_path / "hf", proof="never")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert isinstance(model, LlamaForCausalLM) == (name == "plain")
    total, count = 0.0, 0
    for tokens, learned in CHATS:
        ids = torch.tensor([tokens])
        labels = ids.masked_fill(~torch.tensor([learned]), -100)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
            total += functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += sum(learned)
    assert series(tmp_path / "log.jsonl", "validation_loss") == [pytest.approx(total / count, rel=1e-4)]

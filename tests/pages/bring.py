"""What users have before they begin a page: a model on the Hub, a corpus, texts. Here all of it is tiny."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import zstandard
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints_conversion.formats.test_megatron_legacy import publish
from tests.lckv.serving.served_model import byte_tokenizer
from tests.megatron_ext.model.stages import VOCAB as PUBLISHED_VOCAB

LAYERS, WIDTH, VOCAB, CONTEXT = 4, 64, 257, 128
TINY: dict[str, Any] = {
    "model": {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
    },
    "train": {
        "train_iters": 2,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "seq_length": 64,
        "precision": "fp32",
        "eval_interval": 2,
        "eval_iters": 1,
    },
    "parallel": {
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    },
    "optimizer": {"lr_warmup_iters": 0},
    "data": {"split": "50,50,0"},
    "logging": {"log_interval": 1},
}
"""A run of seconds on one process."""


def model_on_hub(folder: Path, **settings: Any) -> None:
    """A Llama with random weights, and a tokenizer of bytes."""
    if folder.exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
        pad_token_id=None,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(chat=False).save_pretrained(folder)


def corpus(folder: Path, *, files: int = 1, documents: int = 40) -> None:
    """JSON lines, compressed by zstd."""
    folder.mkdir()
    words = ["a", "cache", "of", "keys", "and", "values", "that", "many", "layers", "share"]
    generator = random.Random(1)
    for number in range(files):
        lines = [
            json.dumps({"text": " ".join(generator.choices(words, k=20))}) + "\n" for _ in range(documents)
        ]
        content = zstandard.ZstdCompressor().compress("".join(lines).encode())
        (folder / f"{number:03d}.jsonl.zst").write_bytes(content)


def bring_dmc(folder: Path, hub: Path) -> None:
    """Llama 2 13B on the Hub, a corpus, a text."""
    model_on_hub(hub / "meta-llama/Llama-2-13b-hf")
    corpus(folder / "corpus")
    (folder / "held_out.txt").write_text("a cache that many layers share\n", encoding="utf-8")


def bring_readme(folder: Path, hub: Path) -> None:
    """A model of Hugging Face's, a checkpoint in Megatron's older layout, a text."""
    model_on_hub(folder / "models/llama")
    publish(folder / "models/dmc")
    (folder / "held_out.txt").write_text("a cache that many layers share\n", encoding="utf-8")


def bring_shared_map(folder: Path, hub: Path) -> None:
    """TinyLlama on the Hub, a corpus, a text."""
    model_on_hub(hub / "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", num_key_value_heads=2)
    corpus(folder / "corpus")
    (folder / "held_out.txt").write_text("a cache that many layers share\n", encoding="utf-8")


def bring_published_dmc(folder: Path, hub: Path) -> None:
    """A checkpoint in the layout of the published ones, its tokenizer, a text."""
    published = hub / "nvidia/Llama-2-13B-DMC-4x"
    publish(published)
    (published / "iter_0002000/mp_rank_00").rename(published / "mp_rank_00")
    (published / "iter_0002000").rmdir()
    byte_tokenizer(chat=False, size=PUBLISHED_VOCAB).save_pretrained(hub / "nvidia/tokenizer")
    (folder / "held_out.txt").write_text("A CACHE THAT MANY LAYERS SHARE\n", encoding="utf-8")


def bring_cluster_data(folder: Path, hub: Path) -> None:
    """Twenty files and a tokenizer."""
    corpus(folder / "corpus", files=20, documents=5)
    byte_tokenizer(chat=False).save_pretrained(folder / "data/tokenizer")

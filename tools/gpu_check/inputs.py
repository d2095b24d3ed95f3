"""What the parts of the check work on: a tokenizer, a corpus of made-up documents, settings of runs."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = 500
_COMPRESSIONS = Path(__file__).with_name("compressions.yaml")


@dataclass(frozen=True)
class Sizes:
    """Of the small models."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    seq_length: int
    documents: int


ON_GPU = Sizes(8, 512, 8, 4, 1024, 2000)
TINY = Sizes(6, 64, 4, 2, 64, 200)


def compressions() -> dict[str, dict[str, Any]]:
    """Sections `compression` by name; `layer_types` is a kind of map, to be written out for some layers."""
    sections: dict[str, dict[str, Any]] = yaml.safe_load(_COMPRESSIONS.read_text(encoding="utf-8"))
    return sections


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face folder of a tokenizer of whole words, the end of a document being one of them."""
    folder.mkdir(parents=True)
    vocabulary = {"</s>": 0, "<unk>": 1, **{f"w{number}": number + 2 for number in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_corpus(file: Path, documents: int) -> None:
    """JSON lines; every document counts in steps of its own, so that there is something to learn."""
    draw = random.Random(1)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(documents):
            word, step = draw.randrange(WORDS), draw.randrange(1, 7)
            words = [f"w{(word + step * place) % WORDS}" for place in range(draw.randrange(20, 400))]
            lines.write(json.dumps({"text": " ".join(words)}) + "\n")


def layer_types(kind: str, layers: int) -> str:
    """A map of that kind for `layers` layers."""
    if kind == "lckv":  # two warm-up layers
        return "_".join(["0", *[str(layers - 2)] * (layers - 2), str(layers - 1)])
    if kind == "yoco":
        half = layers // 2
        return "_".join([*(f"{layer}s" for layer in range(half)), *[str(half)] * (layers - half)])
    return "_".join(map(str, range(layers)))


def write_run(file: Path, name: str, sizes: Sizes, folder: Path) -> None:
    """Settings of a bfloat16 run over packed documents that do not see each other."""
    section = compressions()[name]
    compression = {**section, "layer_types": layer_types(section["layer_types"], sizes.num_layers)}
    settings = {
        "model": {
            "num_layers": sizes.num_layers,
            "hidden_size": sizes.hidden_size,
            "num_attention_heads": sizes.num_attention_heads,
            "num_query_groups": sizes.num_query_groups,
        },
        "compression": compression,
        "train": {
            "train_iters": 6,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "seq_length": sizes.seq_length,
            "precision": "bf16",
            "deterministic": True,
        },
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 2},
        "data": {
            "data_path": [str(folder / "corpus")],
            "split": "100,0,0",
            "tokenizer_type": "huggingface",
            "tokenizer_model": str(folder / "tokenizer"),
            "reset_attention_mask": True,
            "reset_position_ids": True,
            "num_workers": 1,
        },
        "checkpoint": {"save": str(folder / name), "save_interval": 3},
        "logging": {"progress_bar": False, "log_interval": 1, "metrics_file": str(folder / f"{name}.jsonl")},
    }
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")

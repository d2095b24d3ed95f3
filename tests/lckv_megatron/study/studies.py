"""Studies for tests."""

import json
from pathlib import Path
from typing import Any

from lckv_megatron.study.description import Study, read_study

SIZES: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2},
    "train": {"micro_batch_size": 1, "global_batch_size": 2, "seq_length": 32, "precision": "fp32"},
    "data": {"mock": True, "num_workers": 0},
}
PLAIN: dict[str, Any] = {**SIZES, "model": {**SIZES["model"], "vocab_size": 96}}


def content(models: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A study as a tree; JSON is YAML."""
    return {
        "settings": PLAIN,
        "budget": {"iterations": 100, "model": next(iter(models), "")},
        "measure": {"text": ["held_out.txt"]},
        "models": models,
        **changes,
    }


def write(folder: Path, tree: object, name: str = "study.yaml") -> Path:
    """The file."""
    path = folder / name
    path.write_text(json.dumps(tree))
    return path


def study(folder: Path, models: dict[str, Any], **changes: Any) -> Study:
    """Written and read."""
    text = folder / "held_out.txt"
    if not text.exists():
        text.write_text("what is measured")
    return read_study(write(folder, content(models, **{"measure": {"text": [str(text)]}, **changes})))

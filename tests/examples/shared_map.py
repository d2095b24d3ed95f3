"""The run of the recipe shared_map as its page starts it, on a model that is not downloaded."""

import re
from pathlib import Path

from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "shared_map"
TINYLLAMA = {
    "num_layers": 22, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 32,
    "num_query_groups": 4, "vocab_size": 32000,
}  # fmt: skip
"""Sizes of the converted model, as model.yaml has them."""


def settings() -> list[str]:
    """Words of the command line: its file, and what model.yaml would add."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    (layer_types,) = re.findall(r"^map=(\S+)$", page, re.MULTILINE)
    sizes = [word for name, value in TINYLLAMA.items() for word in (f"--model.{name}", str(value))]
    return ["--config", str(FOLDER / "uptrain.yaml"), *sizes, "--compression.layer_types", layer_types]


def run_config() -> RunConfig:
    """The same, read."""
    return parse_run_config(settings())

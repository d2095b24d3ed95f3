"""The recipe that gives a sharing map to a model of others: its run can work and costs what its page says."""

import re
from pathlib import Path

from megatron_ext.command_line import parse_run_config
from megatron_ext.validation.run import problems
from tests.examples.costs import gpu_hours

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "shared_map"
TINYLLAMA = {
    "num_layers": 22, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 32,
    "num_query_groups": 4, "vocab_size": 32000,
}  # fmt: skip
"""Sizes of the converted model, as model.yaml has them."""


def test_the_run_works_on_a_node_and_costs_what_the_page_says() -> None:
    page = (RECIPE / "README.md").read_text(encoding="utf-8")
    layer_types = re.search(r"^map=(\S+)$", page, re.MULTILINE)[1]
    sizes = [word for name, value in TINYLLAMA.items() for word in (f"--model.{name}", str(value))]
    run = parse_run_config(
        ["--config", str(RECIPE / "uptrain.yaml"), *sizes, "--compression.layer_types", layer_types]
    )
    assert problems(run, 8) == []
    hours = gpu_hours(run, vocab_size=32000)
    assert f"| Cost | {hours:.0f} GPU-hours" in page
    assert f"| Time | about {hours / 8:.1f} hours |" in page
    assert len(run.compression.map(22).kv_layers) == 11

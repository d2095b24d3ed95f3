"""The recipe that gives a sharing map to a model of others: its run can work and costs what its page says."""

from megatron_ext.validation.run import problems
from tests.examples.costs import gpu_hours
from tests.examples.shared_map import FOLDER, run_config


def test_the_run_works_on_a_node_and_costs_what_the_page_says() -> None:
    page, run = (FOLDER / "README.md").read_text(encoding="utf-8"), run_config()
    assert problems(run, 8) == []
    hours = gpu_hours(run, vocab_size=32000)
    assert f"| Cost | {hours:.0f} GPU-hours" in page
    assert f"| Time | about {hours / 8:.1f} hours |" in page
    assert len(run.compression.map(22).kv_layers) == 11

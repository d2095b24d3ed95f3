"""What validation says about a family of sharing maps."""

import json
from pathlib import Path

import pytest

from megatron_ext.command_line import config_from_dict, config_to_dict, parse_run_config, save_config
from megatron_ext.validation.run import problems
from tests.megatron_ext.validation.test_run import run_with

FAMILY = {
    "model.num_layers": 4,
    "compression.layer_types": "0_0|1_1|2_2|3",
    "train.eval_interval": 5,
    "data.split": "9,1,0",
}
ASKED = "train.eval_layer_types"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({ASKED: ["0_1_2_3", "0_0_0_0"]}, None),
        (
            {ASKED: ["0_0_1_3"]},
            (
                "train.eval_layer_types has 0_0_1_3, which is no map of compression.layer_types, "
                "0_0|1_1|2_2|3: give one that is."
            ),
        ),
        (
            {ASKED: ["0_0_0"]},
            (
                "train.eval_layer_types has '0_0_0'; it has 3 entries but the model has 4 layers: give one "
                "entry per layer."
            ),
        ),
        (
            {ASKED: ["0_0_0_0", "0_0_00_0"]},
            "train.eval_layer_types has 0_0_0_0 more than once: leave one.",
        ),
        (
            {ASKED: ["0_0_0_0"], "train.eval_interval": 0},
            (
                "train.eval_layer_types is 0_0_0_0 and train.eval_interval is 0, so that nothing is "
                "evaluated: set the latter, or leave the former out."
            ),
        ),
        (
            {ASKED: ["0_0_0_0"], "compression.layer_types": "0_0_0_0"},
            (
                "train.eval_layer_types is 0_0_0_0 and compression.layer_types is 0_0_0_0, one map, with "
                "which the model is evaluated anyway: leave the former out."
            ),
        ),
        (
            {
                "parallel.context_parallel_size": 2,
                "parallel.context_parallel_communication": "ring",
                "train.global_batch_size": 8,
            },
            (
                "parallel.context_parallel_communication is ring and compression.layer_types is a family of "
                "maps, 0_0|1_1|2_2|3, in which layers read the keys and values of others; a layer that "
                "others read gathers once for all of them: use gather."
            ),
        ),
    ],
)
def test_what_validation_says(changes: dict, said: str | None) -> None:
    found = problems(run_with(FAMILY | changes), 2 if "parallel.context_parallel_size" in changes else 1)
    assert found == ([] if said is None else [said])


def test_a_list_is_read_from_files_and_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("compression:\n  layer_types: [0_1_2_3, 0_0_2_2]\n")
    run = parse_run_config(["--config", str(tmp_path / "run.yaml"), "--model.num_layers", "4"])
    given = parse_run_config(["--compression.layer_types", "[0_1_2_3, 0_0_2_2]", "--model.num_layers", "4"])
    assert str(run.compression.family(4)) == str(given.compression.family(4)) == "[0_1_2_3, 0_0_2_2]"
    save_config(run, tmp_path / "saved.yaml")
    assert parse_run_config(["--config", str(tmp_path / "saved.yaml")]) == run
    assert config_from_dict(json.loads(json.dumps(config_to_dict(run)))) == run

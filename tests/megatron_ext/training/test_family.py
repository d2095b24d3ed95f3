"""Runs that draw the map of each step from a family: the same in every layout, exact resumption, evaluation
of maps by name."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpointing.errors import MismatchError
from megatron_ext.config import TrainConfig
from megatron_ext.errors import ConfigError
from megatron_ext.training.passes import compression_of_step, evaluated_maps
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.megatron_ext.training.test_loop import check_resumption, parallel
from tests.ranks import run_on_ranks
from tests.thinning import thinned

ROUTING = {"layer_types": "0_0|1_1|2_2|3"}
CYCLIC = {"layer_types": ["0_2_2_3", "0_0_2_2"], "forward_passes": 1, "backward_passes": 2}
MERGING = {**ROUTING, "policy": {"name": "dmc", "stage": "finetune", "initial_decision_bias": 0.3}}
EVALUATION = {"eval_interval": 3, "eval_iters": 1}
NORMS = {"qk_layernorm": True, "add_qkv_bias": True}
ASKED = {"eval_layer_types": ["0_1_2_3", "0_0_2_2"]}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 64}


@pytest.mark.parametrize(
    ("compression", "world_size", "sections"),
    thinned(
        [
            (ROUTING, 2, {"parallel": OVERLAP}),
            (ROUTING, 2, {"parallel": parallel(1, 2)}),
            (CYCLIC, 2, {"parallel": parallel(1, 2)}),
            (MERGING, 2, {"parallel": parallel(2, sequence_parallel=True)}),
            (
                CYCLIC,
                4,
                {"parallel": parallel(2, 2, sequence_parallel=True, use_distributed_optimizer=False)},
            ),
            (ROUTING, 2, {"parallel": parallel(1, 2, virtual_pipeline_model_parallel_size=2)}),
            (ROUTING, 1, {"train": {"recompute_granularity": "full"}}),
            (CYCLIC, 1, {"train": {"recompute_granularity": "full"}}),
            (MERGING, 2, {"parallel": parallel(context_parallel_size=2)}),
            (ROUTING, 4, {"parallel": parallel(4)}),
            (ROUTING, 1, {"train": {"activation_offload": "token_wise", "offload_fraction": 0.5}}),
        ],
        4,
    ),
    ids=str,
)
def test_a_run_does_not_depend_on_the_layout(
    tmp_path: Path, compression: dict[str, Any], world_size: int, sections: dict[str, Any]
) -> None:
    training = {**EVALUATION, **({} if compression is CYCLIC else ASKED)}
    one = tiny_run(compression=compression, train=training, model=NORMS)
    run_on_ranks(1, train, logged_to(one, tmp_path / "one.jsonl"))
    sections = {**sections, "train": {**training, **sections.get("train", {})}}
    many = tiny_run(compression=compression, model=NORMS, **sections)
    run_on_ranks(world_size, train, logged_to(many, tmp_path / "many.jsonl"))
    maps = [compression_of_step(one.compression, one.train, 4, step).layer_types for step in range(6)]
    assert (
        series(tmp_path / "one.jsonl", "layer_types")
        == maps
        == series(tmp_path / "many.jsonl", "layer_types")
    )
    assert len(set(maps)) > 1
    evaluated = ["0_2_2_3", "0_0_2_2"] if compression is CYCLIC else ASKED["eval_layer_types"]
    for name in (
        "lm_loss",
        "grad_norm",
        "validation_loss",
        *(f"validation_loss/{text}" for text in evaluated),
    ):
        expected, found = (series(tmp_path / f"{run}.jsonl", name) for run in ("one", "many"))
        assert len(expected) == (2 if name.startswith("validation") else 6)
        assert found == pytest.approx(expected, rel=1e-4 if compression is MERGING else 2e-5), name
    last = reports(tmp_path / "one.jsonl")[-1]
    assert last["validation_layer_types"] == evaluated[0]
    assert last["validation_loss"] == last[f"validation_loss/{evaluated[0]}"]
    assert last["validation_loss"] != last[f"validation_loss/{evaluated[1]}"]


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    settings = {"compression": ROUTING, "train": {"precision": "bf16"}, "parallel": parallel(1, 2)}
    check_resumption(tmp_path, 2, settings, {})
    start = str(tmp_path / "straight" / "iter_0000003")
    for layer_types in ("0_0_2_2", "0_0|1_2_2|3"):
        other = tiny_run(compression={"layer_types": layer_types}, checkpoint={"load": start})
        with pytest.raises(
            MismatchError, match=r"compression.layer_types: \"0_0\|1_1\|2_2\|3\" in the checkpoint"
        ):
            run_on_ranks(1, train, other)
    teacher = tiny_run(train={"distillation": {"teacher": start}})
    with pytest.raises(
        ConfigError, match=r"was trained with a family of maps, 0_0\|1_1\|2_2\|3, so that it must"
    ):
        run_on_ranks(1, train, teacher)


def test_which_maps_an_evaluation_looks_at() -> None:
    def names(layer_types: Any, **settings: Any) -> list[str]:
        family = tiny_run(compression={"layer_types": layer_types}).compression.family(4)
        return [str(one) for one in evaluated_maps(family, TrainConfig(**settings))]

    assert names("0_0_2_2") == ["0_0_2_2"]
    assert names(CYCLIC["layer_types"]) == CYCLIC["layer_types"]
    assert names("0_1_0|2_0|3") == ["0_1_0_0", "0_1_0_3", "0_1_2_0", "0_1_2_3"]
    assert names("0_0|1_1|2_2|3") == ["0_0_0_0"]
    assert names("0_0|1_1|2_2|3", eval_layer_types=("0_1_2_2",)) == ["0_1_2_2"]

"""Whole runs: the same losses in every layout, exact resumption, stopping, and losses that are not finite."""

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpointing.errors import CheckpointError
from megatron_ext.checkpointing.save import Saves
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.training import iteration
from megatron_ext.training.step import NonFiniteLossError, StepResult
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks
from tests.thinning import thinned

YOCO = {"layer_types": "0s_1s_2_2", "sliding_window": 8}
LCKV = {"layer_types": "0_2_2_3", "forward_passes": 2, "backward_passes": 2}
TWO_GROUPS = {"layer_types": "1_1_3_3", "forward_passes": 1, "backward_passes": 3}
TIED = {"layer_types": "0_0_1_1"}
"""Trained with one matrix for the embedding and the output layer."""
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


def tying(compression: dict[str, Any]) -> dict[str, bool]:
    return {"untie_embeddings_and_output_weights": compression is not TIED}


def parallel(tp: int = 1, pp: int = 1, **options: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **options}


_CONTEXT = parallel(context_parallel_size=2)


@pytest.mark.parametrize(
    ("compression", "world_size", "layout", "micro_batch_size"),
    thinned(  # by day: the first of each two
        [
            (TIED, 2, parallel(1, 2), 1),
            (TIED, 4, parallel(2, 2, sequence_parallel=True), 2),
            (YOCO, 4, parallel(2, 2), 1),
            (YOCO, 2, parallel(1, 2), 2),
            (LCKV, 2, parallel(2, sequence_parallel=True), 4),
            (YOCO, 4, parallel(1, 4), 1),
            (LCKV, 2, parallel(overlap_grad_reduce=True, overlap_param_gather=True), 1),
            (LCKV, 2, parallel(use_distributed_optimizer=False), 2),
            (LCKV, 4, parallel(2), 2),
            (LCKV, 2, parallel(1, 2), 1),
            (LCKV, 4, parallel(1, 4), 2),
            (LCKV, 4, parallel(2, 2, sequence_parallel=True, pipeline_in_flight=4), 1),
            (LCKV, 4, parallel(1, 2, overlap_grad_reduce=True, overlap_param_gather=True), 1),
            (TWO_GROUPS, 4, parallel(1, 4), 1),
            (TWO_GROUPS, 2, parallel(1, 2, use_distributed_optimizer=False), 2),
            (YOCO, 2, parallel(1, 2, virtual_pipeline_model_parallel_size=2), 1),
            (TIED, 2, parallel(1, 2, virtual_pipeline_model_parallel_size=2, overlap_grad_reduce=True), 1),
            (LCKV, 2, parallel(1, 2, virtual_pipeline_model_parallel_size=2), 2),
            (LCKV, 2, parallel(1, 2, pipeline_model_parallel_layout="Et|t*3L"), 1),
            (YOCO, 2, parallel(1, 2, pipeline_model_parallel_layout="auto"), 1),
            (
                LCKV,
                2,
                parallel(context_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True),
                1,
            ),
            (YOCO, 4, parallel(2, context_parallel_size=2, sequence_parallel=True), 4),
        ],
        2,
    ),
    ids=str,
)
def test_losses_do_not_depend_on_the_layout(
    tmp_path: Path, compression: dict, world_size: int, layout: dict, micro_batch_size: int
) -> None:
    evaluation = {"eval_interval": 3, "eval_iters": 2}
    one = tiny_run(compression=compression, train=evaluation, model=tying(compression))
    run_on_ranks(1, train, logged_to(one, tmp_path / "one.jsonl"))
    batch = {**evaluation, "micro_batch_size": micro_batch_size}
    many = tiny_run(compression=compression, train=batch, parallel=layout, model=tying(compression))
    run_on_ranks(world_size, train, logged_to(many, tmp_path / "many.jsonl"))
    for name in ("lm_loss", "grad_norm", "validation_loss"):
        expected, found = (series(tmp_path / f"{run}.jsonl", name) for run in ("one", "many"))
        assert len(expected) == (2 if name == "validation_loss" else 6)
        assert found == pytest.approx(expected, rel=2e-5), name
    assert expected[0] < math.log(97) + 0.5


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"compression": LCKV, "model": DROPOUT, "train": {"precision": "bf16"}}),
        (2, {"compression": YOCO, "model": DROPOUT, "parallel": parallel(1, 2)}),
        (2, {"compression": LCKV, "model": DROPOUT, "parallel": parallel(2, sequence_parallel=True)}),
        (2, {"compression": LCKV, "train": {"precision": "bf16"}, "parallel": parallel(1, 2)}),
    ],
    ids=["dp2-bf16", "pp2", "tp2-sp", "pp2-ring-bf16"],
)
@pytest.mark.parametrize("way", [{}, {"async_save": True, "optimizer_sharding": "dp_reshardable"}])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, world_size: int, settings: dict, way: dict) -> None:
    check_resumption(tmp_path, world_size, settings, way)


def test_a_resumed_run_of_parts_of_rows_is_bit_equal(tmp_path: Path) -> None:
    settings = {"compression": LCKV, "model": {"hidden_dropout": 0.1}, "parallel": _CONTEXT}
    check_resumption(tmp_path, 2, settings, {})


def check_resumption(tmp_path: Path, world_size: int, settings: dict, way: dict) -> None:
    """Weights, optimizer, random states and reports of iteration 6, once straight and once from the
    checkpoint of iteration 3."""
    saving = {"save": str(tmp_path / "straight"), "save_interval": 3, **way}
    straight = tiny_run(**settings, checkpoint=saving)
    run_on_ranks(world_size, train, logged_to(straight, tmp_path / "straight.jsonl"))
    start = tmp_path / "straight" / "iter_0000003"
    saving = {"load": str(start), "save": str(tmp_path / "resumed"), **way}
    resumed = tiny_run(**settings, checkpoint=saving)
    run_on_ranks(world_size, train, logged_to(resumed, tmp_path / "resumed.jsonl"))
    manifests = [tmp_path / run / "iter_0000006" / "manifest.json" for run in ("straight", "resumed")]
    expected, found = (hashes(path) for path in manifests)
    assert any(name.endswith(".distcp") for name in expected)
    assert any(name.startswith("rng") for name in expected)
    assert found == expected
    for name in ("lm_loss", "grad_norm", "learning_rate", "consumed_tokens"):
        assert series(tmp_path / "resumed.jsonl", name) == series(tmp_path / "straight.jsonl", name)[3:]
    stalled = [report["iteration"] for report in reports(tmp_path / "straight.jsonl") if _STALL in report]
    assert stalled and stalled[0] == 4
    assert len(stalled) == 1 or way, "it may be published later"


_STALL = "save_stall_seconds"


def hashes(manifest: Path) -> dict[str, str]:
    """What the files hold, but for the settings (where to load from) and the table of contents."""
    files = json.loads(manifest.read_text())["files"]
    return {
        name: entry["sha256"] for name, entry in files.items() if name not in ("config.json", ".metadata")
    }


_INTERLEAVED = parallel(1, 2, virtual_pipeline_model_parallel_size=2)
_UNEVEN = parallel(1, 2, pipeline_model_parallel_layout="Ettt|tL")


@pytest.mark.parametrize(
    ("compression", "tied", "before", "after"),
    [
        (YOCO, False, (2, {}), (4, parallel(2, 2))),
        (YOCO, True, (2, {}), (4, parallel(2, 2))),
        (LCKV, True, (2, _INTERLEAVED), (2, parallel(2))),
        (LCKV, False, (1, {}), (2, _UNEVEN)),
        (LCKV, False, (2, _UNEVEN), (2, _INTERLEAVED)),
        (LCKV, False, (2, _CONTEXT), (2, parallel(2))),
    ],
    ids=["untied", "tied", "interleaved to tp2", "one to uneven", "uneven to interleaved", "cp2 to tp2"],
)
def test_a_run_resumes_on_another_layout(
    tmp_path: Path, compression: dict, tied: bool, before: tuple[int, dict], after: tuple[int, dict]
) -> None:
    """The padded vocabulary differs too: 128 rows with one tensor-parallel rank, 256 with two."""
    saving = {"save": str(tmp_path / "run"), "save_interval": 3}
    model = {"untie_embeddings_and_output_weights": not tied}
    straight = tiny_run(compression=compression, model=model, checkpoint=saving, parallel=before[1])
    run_on_ranks(before[0], train, logged_to(straight, tmp_path / "straight.jsonl"))
    loading = {"load": str(tmp_path / "run" / "iter_0000003")}
    moved = tiny_run(compression=compression, model=model, checkpoint=loading, parallel=after[1])
    run_on_ranks(after[0], train, logged_to(moved, tmp_path / "moved.jsonl"))
    for name in ("lm_loss", "grad_norm"):
        expected = series(tmp_path / "straight.jsonl", name)[3:]
        assert series(tmp_path / "moved.jsonl", name) == pytest.approx(expected, rel=2e-5)


def test_buckets_of_other_stages_are_not_loaded(tmp_path: Path) -> None:
    way = {"optimizer_sharding": "dp_reshardable"}
    saving = {"save": str(tmp_path), "save_interval": 3, **way}
    run_on_ranks(2, train, tiny_run(compression=LCKV, checkpoint=saving, parallel=_UNEVEN))
    loading = {"load": str(tmp_path / "iter_0000003"), **way}
    other = tiny_run(compression=LCKV, checkpoint=loading, parallel=parallel(1, 2))
    with pytest.raises(
        CheckpointError, match=r"saved by .*PP 2 with layers 0-2 \| 3-3, .*this run has .*PP 2, "
    ):
        run_on_ranks(2, train, other)


def test_finetuning_starts_afresh_from_the_weights(tmp_path: Path) -> None:
    first = tiny_run(compression=YOCO, checkpoint={"save": str(tmp_path / "run")})
    run_on_ranks(1, train, logged_to(first, tmp_path / "first.jsonl"))
    load = {"load": str(tmp_path / "run"), "finetune": True}
    second = tiny_run(compression=YOCO, checkpoint=load, train={"train_iters": 3})
    run_on_ranks(1, train, logged_to(second, tmp_path / "second.jsonl"))
    found = reports(tmp_path / "second.jsonl")
    assert [report["iteration"] for report in found] == [1, 2, 3]
    assert found[0]["learning_rate"] == reports(tmp_path / "first.jsonl")[0]["learning_rate"]
    assert found[0]["lm_loss"] < reports(tmp_path / "first.jsonl")[0]["lm_loss"] - 0.1


def test_weights_alone_can_go_on_with_longer_contexts(tmp_path: Path) -> None:
    """Positions have no weights. All else is as for any checkpoint: what the longer run saves has its own
    positions, and a run that takes all state is refused, with the way out."""
    run_on_ranks(1, train, tiny_run(checkpoint={"save": str(tmp_path / "short")}, train={"train_iters": 3}))
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    longer = {"rotary_base": 50000.0, "rope_scaling": scaling}
    load = {"load": str(tmp_path / "short")}
    reason = (
        r"model\.rotary_base: 10000\.0 in the checkpoint(.|\n)*model\.rope_scaling: null in the checkpoint"
        r"(.|\n)*For longer contexts, set checkpoint\.finetune"
    )
    with pytest.raises(CheckpointError, match=reason):
        run_on_ranks(1, train, tiny_run(model=longer, checkpoint=load))
    save = {**load, "finetune": True, "save": str(tmp_path / "long")}
    stopped = tiny_run(model=longer, checkpoint=save, train={"exit_duration_minutes": 1e-9})
    assert run_on_ranks(1, train, stopped) == [1]
    assert run_on_ranks(1, train, tiny_run(model=longer, checkpoint=save)) == [6]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run_on_ranks(
        1, train, tiny_run(compression=YOCO, checkpoint={"save": str(tmp_path)}, train={"train_iters": 3})
    )
    other = tiny_run(compression=LCKV, checkpoint={"load": str(tmp_path)})
    reason = (
        r'is of another model:\s+compression\.layer_types: "0s_1s_2_2" in the checkpoint, "0_2_2_3" in this '
        r"run(.|\n)*another map by conversion: lckv-megatron convert megatron-to-hf --megatron-path .*0003 "
    )
    with pytest.raises(CheckpointError, match=reason):
        run_on_ranks(2, train, other)


def test_when_time_is_up_the_run_saves_and_ends(tmp_path: Path) -> None:
    run = tiny_run(train={"exit_duration_minutes": 1e-9}, checkpoint={"save": str(tmp_path)})
    assert run_on_ranks(2, train, run) == [1, 1]
    assert (tmp_path / "iter_0000001" / "manifest.json").exists()
    assert run_on_ranks(1, train, tiny_run(checkpoint={"load": str(tmp_path)})) == [6]


@pytest.mark.parametrize("layout", [{}, _CONTEXT], ids=["dp2", "cp2"])
def test_a_loss_that_is_not_finite_stops_the_run(layout: dict) -> None:
    run = tiny_run(model={"init_method_std": 3e38}, parallel=layout)
    first = r"4 of 4 samples, the first of them number 0, which begins in dataset data\.mock, document 0"
    with pytest.raises(
        NonFiniteLossError,
        match=rf"iteration 1: the loss is nan .*such a loss: 0, 1; {first}, token 0\).*Resume from",
    ):
        run_on_ranks(2, train, run)


def test_what_was_saved_before_a_bad_loss_becomes_a_checkpoint(tmp_path: Path) -> None:
    saving = {"save": str(tmp_path), "save_interval": 1, "async_save": True}
    assert run_on_ranks(2, _diverge, tiny_run(checkpoint=saving)) == [True] * 2
    assert (tmp_path / "latest").read_text() == "iter_0000001\n"


def _diverge(run: RunConfig) -> bool:
    """The second loss is bad, and the save of the first iteration has not ended when it is found."""
    require = iteration.require_finite

    def fail(result: StepResult, number: int, *others: Any) -> None:
        require(replace(result, lm_loss=math.nan) if number == 2 else result, number, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "require_finite", fail)
        patch.setattr(Saves, "settle", lambda made: None)
        try:
            train(run)
        except NonFiniteLossError:
            return True
    return False


def test_an_error_leaves_no_reading_processes() -> None:
    run = tiny_run(model={"init_method_std": 3e38}, data={"mock": True, "num_workers": 2})
    assert run_on_ranks(1, processes_behind_an_error, run) == [0]


def processes_behind_an_error(run: RunConfig) -> int:
    before = set(multiprocessing.active_children())
    with pytest.raises(NonFiniteLossError) as caught:
        train(run)
    assert caught.value.__traceback__ is not None  # alive, as that of an error that ends a program is
    return len(set(multiprocessing.active_children()) - before)


def test_it_may_be_told_to_go_on() -> None:
    settings = {"train_iters": 3, "check_for_nan_in_loss": False}
    run = tiny_run(model={"init_method_std": 3e38}, train=settings)
    assert run_on_ranks(1, train, run) == [3]


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        run_on_ranks(1, train, tiny_run(model={"vocab_size": None}))


def test_it_learns(tmp_path: Path) -> None:
    """Mock documents can be learned: the last of 40 steps is well below the first."""
    run = tiny_run(compression=LCKV, train={"train_iters": 40}, optimizer={"lr": 2e-2})
    run_on_ranks(2, train, logged_to(run, tmp_path / "run.jsonl"))
    losses = series(tmp_path / "run.jsonl", "lm_loss")
    assert losses[-1] < losses[0] - 0.5


def test_a_directory_with_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    saving = {"checkpoint": {"save": str(tmp_path), "resume": "never"}, "train": {"train_iters": 3}}
    run_on_ranks(1, train, tiny_run(**saving))
    with pytest.raises(ConfigError, match=r"holds checkpoints of another run \(iter_0000003 and 0 more\)"):
        run_on_ranks(2, train, tiny_run(**saving))
    going_on = {"checkpoint": {"save": str(tmp_path), "load": str(tmp_path)}, "train": {"train_iters": 4}}
    assert run_on_ranks(1, train, tiny_run(**going_on)) == [4]
    assert (tmp_path / "run.yaml").exists()


def test_a_run_may_go_on_with_another_batch_size(tmp_path: Path) -> None:
    run_on_ranks(1, train, tiny_run(checkpoint={"save": str(tmp_path), "save_interval": 3}))
    smaller = tiny_run(train={"global_batch_size": 1}, checkpoint={"load": str(tmp_path / "iter_0000003")})
    assert run_on_ranks(1, train, smaller) == [6]


def test_a_chunked_loss_waits_for_gathered_weights() -> None:
    """Sequence parallelism, a loss in chunks and weights that are gathered late, two updates in a row."""
    late = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    run = tiny_run(compression=LCKV, model={"cross_entropy_chunk_size": 8}, parallel=late)
    assert run_on_ranks(4, train, run) == [6] * 4

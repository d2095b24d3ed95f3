"""Whole runs: a resumed run equals the uninterrupted one, on the same layout bit for bit and on others in
every tensor."""

import json
import logging
import multiprocessing
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpointing.rng import rng_states
from megatron_ext.checkpointing.save import save_checkpoint
from megatron_ext.errors import ConfigError
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks

Tensors = dict[str, torch.Tensor]
KEYS = ("main", "exp_avg", "exp_avg_sq")


def _snapshot(run: Run) -> dict[str, Tensors]:
    """Everything that decides how the run goes on, whole, on every rank."""
    state = {key: run.moments(key) for key in KEYS}
    groups = run.optimizer.param_groups
    numbers = {"lr": [group["lr"] for group in groups], "wd": [group["weight_decay"] for group in groups]}
    numbers["steps"] = [run.scheduler.num_steps]
    return {"weights": run.weights(), **state, "numbers": {k: torch.tensor(v) for k, v in numbers.items()}}


def _assert_equal(left: dict[str, Tensors], right: dict[str, Tensors]) -> None:
    assert left.keys() == right.keys()
    for part in left:
        assert left[part].keys() == right[part].keys()
        for name in left[part]:
            assert left[part][name].dtype == right[part][name].dtype
            assert torch.equal(left[part][name], right[part][name]), f"{part} of {name}"


def _uninterrupted(case: Case) -> tuple[list[float], dict[str, Tensors], Tensors]:
    run = Run(case)
    losses = run.train(5)
    return losses, _snapshot(run), rng_states()


def _interrupted(case: Case, directory: Path) -> list[float]:
    run = Run(case)
    losses = run.train(2)
    run.save(directory, 2)
    return losses + run.train(3)


def _resumed(case: Case, directory: Path) -> tuple[list[float], dict[str, Tensors], Tensors]:
    run = Run(case, seed=99)  # other weights, random numbers, moments and steps than those of the saved run
    run.train(1)
    loaded = run.load(directory)
    assert (loaded.iteration, loaded.same_layout, loaded.directory) == (2, True, directory / "iter_0000002")
    assert loaded.progress == {"consumed_samples": 8, "note": "x"}
    assert loaded.config == case.config
    losses = run.train(3)
    return losses, _snapshot(run), rng_states()


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (1, Case()),
        (1, Case(bf16=True, distributed_optimizer=False)),
        (2, Case(bf16=True)),
        (2, Case(distributed_optimizer=False)),
        (2, Case(bf16=True, overlap=True)),
        (2, Case(tp=2, bf16=True)),
        (2, Case(pp=2)),
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, world_size: int, case: Case
) -> None:
    uninterrupted = run_on_ranks(world_size, _uninterrupted, case)
    saving = run_on_ranks(world_size, _interrupted, case, tmp_path)
    resumed = run_on_ranks(world_size, _resumed, case, tmp_path)
    for (losses, state, rng), losses_with_save, (resumed_losses, resumed_state, resumed_rng) in zip(
        uninterrupted, saving, resumed, strict=True
    ):
        assert losses_with_save == losses, "saving changes nothing"
        assert resumed_losses == losses[2:]
        _assert_equal(resumed_state, state)
        _assert_equal({"rng": resumed_rng}, {"rng": rng})


def _save(case: Case, directory: Path) -> dict[str, Tensors]:
    run = Run(case)
    run.train(2)
    run.save(directory, 2)
    return _snapshot(run)


def _load(case: Case, directory: Path) -> tuple[bool, dict[str, Tensors], list[dict[str, float]]]:
    run = Run(case, seed=99)
    draws = []
    for seed in (5, 6, 5):
        loaded = run.load(directory, seed=seed)
        draws.append({name: state.double().sum().item() for name, state in rng_states().items()})
    snapshot = _snapshot(run)
    run.train(1)
    return loaded.same_layout, snapshot, draws


@pytest.mark.parametrize(
    ("saved", "saved_ranks", "loaded", "loaded_ranks"),
    [
        (Case(), 1, Case(tp=2), 2),
        (Case(tp=2, bf16=True), 2, Case(pp=2, bf16=True), 2),
        (Case(bf16=True), 2, Case(bf16=True), 1),
        (Case(distributed_optimizer=False), 1, Case(pp=2, distributed_optimizer=False), 2),
        (Case(pp=2), 2, Case(), 1),
        (Case(tp=2, pp=2), 4, Case(tp=2), 4),
    ],
    ids=str,
)
def test_another_layout_gets_the_same_whole_state(
    tmp_path: Path, saved: Case, saved_ranks: int, loaded: Case, loaded_ranks: int
) -> None:
    whole = run_on_ranks(saved_ranks, _save, saved, tmp_path)[0]
    for same_layout, state, (first, other_seed, again) in run_on_ranks(loaded_ranks, _load, loaded, tmp_path):
        assert not same_layout
        _assert_equal(state, whole)
        assert first == again
        assert all(
            first[name] != other_seed[name] for name in first if not name.endswith(("gauss", "position"))
        )


def _log_of_load(case: Case, directory: Path) -> str:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ext").addHandler(handler)
    try:
        Run(case).load(directory)
    finally:
        logging.getLogger("megatron_ext").removeHandler(handler)
    return "\n".join(lines)


def test_another_layout_says_that_random_states_are_new(tmp_path: Path) -> None:
    run_on_ranks(2, _save, Case(tp=2), tmp_path)
    assert _log_of_load_on(2, Case(tp=2), tmp_path) == ["", ""]
    first, second = _log_of_load_on(2, Case(), tmp_path)
    assert (
        "saved by 2 cpu rank(s) (TP 2, PP 1, CP 1, DP 1), this run has 2 cpu rank(s) (TP 1, PP 1, CP 1, DP 2)"
        in first
    )
    assert "seeded anew" in first
    assert second == ""


def _log_of_load_on(world_size: int, case: Case, directory: Path) -> list[str]:
    return run_on_ranks(world_size, _log_of_load, case, directory)


def _load_weights(
    case: Case, directory: Path, with_optimizer: bool
) -> tuple[dict[str, Tensors], Tensors, bool]:
    run = Run(case, seed=99)
    before = rng_states()
    if with_optimizer:
        run.load(directory, finetune=True)
    else:
        run.load(directory, optimizer=None, scheduler=None)
    untouched = all(torch.equal(before[name], state) for name, state in rng_states().items())
    fresh = run.scheduler.num_steps == 0 and not any(
        leaf.optimizer.state for leaf in run.optimizer.chained_optimizers
    )
    weights = run.weights()
    main = run.moments("main")
    return {"weights": weights}, main, untouched and fresh


@pytest.mark.parametrize(("with_optimizer", "distributed"), [(True, True), (True, False), (False, True)])
def test_weights_only(tmp_path: Path, with_optimizer: bool, distributed: bool) -> None:
    """Into a bf16 model whose optimizer keeps float32 main weights: they must follow, or the first step
    undoes the loading."""
    whole = run_on_ranks(1, _save, Case(), tmp_path)[0]
    case = Case(tp=2, bf16=True, distributed_optimizer=distributed)
    for weights, main, fresh in run_on_ranks(2, _load_weights, case, tmp_path, with_optimizer):
        assert fresh, "optimizer, schedule and random states start afresh"
        rounded = {name: tensor.bfloat16() for name, tensor in whole["weights"].items()}
        _assert_equal(weights, {"weights": rounded})
        if with_optimizer:
            _assert_equal(
                {"main": main}, {"main": {name: tensor.float() for name, tensor in rounded.items()}}
            )


def _save_before_the_first_step(case: Case, directory: Path) -> list[float]:
    run = Run(case)
    run.save(directory, 0)
    return run.train(3)


def _load_and_train(case: Case, directory: Path) -> list[float]:
    run = Run(case, seed=99)
    run.load(directory)
    return run.train(3)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_an_optimizer_that_has_not_stepped(tmp_path: Path, distributed_optimizer: bool) -> None:
    case = Case(distributed_optimizer=distributed_optimizer)
    assert run_on_ranks(2, _save_before_the_first_step, case, tmp_path) == run_on_ranks(
        2, _load_and_train, case, tmp_path
    )


def _load_into_other_vocabulary(case: Case, directory: Path) -> Tensors:
    run = Run(case, seed=99)
    run.load(directory)
    return run.weights()


def test_the_padding_of_the_vocabulary_may_differ(tmp_path: Path) -> None:
    """It depends on the tensor-parallel size. What is new is zero."""
    whole = run_on_ranks(1, _save, Case(vocabulary=128), tmp_path)[0]["weights"]
    name = "output_layer.weight"
    more = run_on_ranks(2, _load_into_other_vocabulary, Case(tp=2, vocabulary=136), tmp_path)[0]
    assert torch.equal(more[name][:128], whole[name])
    assert not more[name][128:].any()


def _save_some(directory: Path, keep_last: int) -> list[str]:
    run = Run(Case())
    for iteration in (1, 2, 3, 4):
        run.save(directory, iteration, keep_last=keep_last)
    return sorted(os.listdir(directory))


def test_keep_last(tmp_path: Path) -> None:
    assert run_on_ranks(2, _save_some, tmp_path, 2) == [["iter_0000003", "iter_0000004", "latest"]] * 2


def test_keep_last_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last: 0 given; at least 1"):
        save_checkpoint(
            tmp_path, 1, model=[], optimizer=None, scheduler=None, progress={}, config={}, keep_last=0
        )


def _save_without_processes(directory: Path) -> tuple[list[str], list[str]]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a process was started")

    run = Run(Case())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        patch.setattr(subprocess.Popen, "__init__", refuse)
        path = run.save(directory, 1)
    parts = [path / name for name in os.listdir(path) if name.endswith(".distcp")]
    return [str(part.name) for part in sorted(parts)], json.loads((path / "config.json").read_text())


def test_every_rank_writes_for_itself_and_no_process_is_started(tmp_path: Path) -> None:
    (files, config), _ = run_on_ranks(2, _save_without_processes, tmp_path)
    assert files == ["__0_0.distcp", "__1_0.distcp"]
    assert config == Case().config


def _refuse_to_load(case: Case, directory: Path, options: dict[str, Any]) -> tuple[str, str, bool]:
    run = Run(case)
    before = _snapshot_of_weights(run)
    try:
        run.load(directory, **options)
    except Exception as error:
        after = _snapshot_of_weights(run)
        return (
            type(error).__name__,
            str(error),
            all(torch.equal(before[name], after[name]) for name in before),
        )
    return "", "", False


def _snapshot_of_weights(run: Run) -> Tensors:
    return {name: tensor.clone() for name, tensor in run.weights().items()}


@pytest.mark.parametrize(
    ("case", "options", "parts"),
    [
        (
            Case(num_layers=4, hidden_size=64),
            {},
            [
                "is of another model:",
                "\n  model.num_layers: 2 in the checkpoint, 4 in this run",
                "\n  model.hidden_size: 32 in the checkpoint, 64 in this run",
                "Set these fields as in the checkpoint",
            ],
        ),
        (
            Case(num_layers=4, hidden_size=64),
            {"expected_model": {}},
            [
                "does not fit this run's model",
                "missing there: decoder.layers.2.",
                "other shape: decoder.final_layernorm.bias (there [32], here [64])",
                "Build the model as its config.json says",
            ],
        ),
        (
            Case(distributed_optimizer=False),
            {},
            [
                "does not fit this run's optimizer",
                "the distributed optimizer: there True, here False",
                "parallel.use_distributed_optimizer",
            ],
        ),
        (
            Case(train_iters=20),
            {},
            ["learning-rate schedule differs", "total number of iterations", "checkpoint.finetune"],
        ),
    ],
    ids=["settings", "tensors", "optimizer", "schedule"],
)
def test_another_model_is_refused(
    tmp_path: Path, case: Case, options: dict[str, Any], parts: list[str]
) -> None:
    run_on_ranks(2, _save, Case(), tmp_path)
    first, second = run_on_ranks(2, _refuse_to_load, case, tmp_path, options)
    assert first[:2] == second[:2]
    name, message, untouched = first
    assert name == "MismatchError"
    for part in parts:
        assert part in message
    assert untouched or "schedule" in message


def _save_weights(directory: Path) -> None:
    run = Run(Case())
    save_checkpoint(
        directory, 1, model=run.model, optimizer=None, scheduler=None, progress={}, config=run.case.config
    )


def test_weights_without_an_optimizer_are_no_run_to_resume(tmp_path: Path) -> None:
    run_on_ranks(1, _save_weights, tmp_path)
    name, message, untouched = run_on_ranks(1, _refuse_to_load, Case(), tmp_path, {})[0]
    assert (name, untouched) == ("MismatchError", True)
    assert "holds weights only" in message
    assert "Set checkpoint.finetune" in message
    assert run_on_ranks(1, _refuse_to_load, Case(), tmp_path, {"finetune": True})[0][0] == ""


def test_a_setting_that_an_older_checkpoint_does_not_have_is_only_reported(tmp_path: Path) -> None:
    run_on_ranks(1, _save, Case(), tmp_path)
    log = run_on_ranks(1, _log_of_newer_program, tmp_path)[0]
    assert log == "the checkpoint does not say what model.new_setting was; this run has [1, 2]"


def _log_of_newer_program(directory: Path) -> str:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ext.checkpointing.load").addHandler(handler)
    run = Run(Case())
    run.load(directory, expected_model={"model": {"num_layers": 2, "new_setting": (1, 2)}})
    return "\n".join(lines)


def test_tests_compare_what_they_claim() -> None:
    """The oracle of this file: every rank sees the whole state, cut in any way."""
    one = run_on_ranks(1, _whole_after_one_step, Case(dropout=0.0))[0]
    two = run_on_ranks(2, _whole_after_one_step, Case(dropout=0.0, tp=2))
    shapes = {part: {name: tensor.shape for name, tensor in tensors.items()} for part, tensors in one.items()}
    for state in two:
        assert {
            part: {name: tensor.shape for name, tensor in tensors.items()} for part, tensors in state.items()
        } == shapes
    assert all(tensor.any() for tensor in one["exp_avg_sq"].values())


def _whole_after_one_step(case: Case) -> dict[str, Tensors]:
    run = Run(replace(case))
    run.train(1)
    dist.barrier()
    return _snapshot(run)

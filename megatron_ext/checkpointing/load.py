"""Finds the newest good checkpoint, checks it, and loads it on whatever layout this run has."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from safetensors import SafetensorError

from lckv.errors import ModelError
from lckv.plain_files import read_plain
from lckv.weights.json_file import read_json_object
from megatron_ext.checkpointing.agreement import Agreement, agreement
from megatron_ext.checkpointing.buckets import sharding_of
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError, MismatchError
from megatron_ext.checkpointing.folders import choose_checkpoint, find_candidates
from megatron_ext.checkpointing.fp8_state import leave_out_unsaved
from megatron_ext.checkpointing.manifest import Layout, Manifest, find_wrong_hashes, share_of_rank
from megatron_ext.checkpointing.rng import reseed, restore_rng_states
from megatron_ext.checkpointing.state import apply_state, check_fit, read_state, sharded_state
from megatron_ext.checkpointing.verification import (
    CONFIG_NAME,
    PROGRESS_NAME,
    SCHEDULER_NAME,
    find_problems,
    large_files,
)
from megatron_ext.checkpointing.writing import current_layout, rng_file

_MAP = "compression.layer_types"
_WAY_TO_ANOTHER_MAP = (
    ". A plain model's weights get another map by conversion: lckv-megatron convert megatron-to-hf "
    "--megatron-path {} --hf-path NEW (with --layer-types MAP if it has a family of maps), then "
    "lckv-megatron convert hf-to-megatron --hf-path NEW --megatron-path NEW2 --compression.layer_types MAP"
)
_POSITIONS = ("model.rotary_base", "model.rope_scaling")
_WAY_TO_OTHER_POSITIONS = ". For longer contexts, set checkpoint.finetune to take the weights only"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What was loaded."""

    directory: Path
    """Folder of the checkpoint."""
    iteration: int
    """Optimizer steps done when it was saved."""
    progress: dict[str, Any]
    """The counters given to `save_checkpoint`."""
    config: dict[str, Any]
    """The settings given to `save_checkpoint`."""
    same_layout: bool
    """Whether it was saved from this run's parallel layout, so that this run can go on bit for bit."""


@dataclass(frozen=True)
class _Run:
    """The JSON files of a checkpoint."""

    progress: dict[str, Any]
    config: dict[str, Any]
    scheduler: dict[str, Any] | None


def load_checkpoint(
    path: Path,
    *,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    finetune: bool = False,
    verify_hashes: bool = True,
    expected_model: Mapping[str, Any],
    setting_of: Callable[[str], str] = str,
    seed: int = 0,
    timeout_minutes: float = 30.0,
) -> LoadedCheckpoint:
    """Loads model, optimizer, schedule and random states in place. All ranks call it together.

    `path` is one checkpoint, or a directory of them: then the one that `latest` names, and when that is
    damaged the newest good one, with a warning. `expected_model` holds settings that must be equal in the
    checkpoint's config, under the same keys (nested mappings are compared key by key; keys that an older
    checkpoint does not have are only reported). `setting_of` names the setting behind a key such as
    section.field, for messages.

    With `finetune`, or without `optimizer`, only weights are loaded; an optimizer then takes its main weights
    from them. Random states are restored where optimizer and layout are those of the saved run; on another
    layout all generators are seeded from `seed` and the iteration.

    Raises the same error on all ranks: NoCheckpointError, DamagedCheckpointError (with all that was tried)
    and MismatchError before any weight is changed; MissingRanksError when a rank does not come
    to a step within `timeout_minutes`.
    """
    weights_only = finetune or optimizer is None
    with agreement(timeout_minutes) as ranks:
        checkpoint, manifest = _choose(ranks, Path(path), verify_hashes)
        run = ranks.on_first(
            "read the run's settings", lambda: _read_run(checkpoint, expected_model, setting_of)
        )
        here = current_layout(model)
        same_layout = manifest.layout == here

        contents = ranks.everywhere("read the table of contents", lambda: read_contents(checkpoint))
        stored = contents.state_dict_metadata.keys()
        sharding = sharding_of(stored)
        if sharding == "dp_reshardable" and not weights_only:
            _check_buckets(checkpoint, manifest.layout, here)
        state = ranks.everywhere(
            "prepare loading",
            lambda: sharded_state(
                model, None if weights_only else optimizer, stored=stored, sharding=sharding
            ),
        )
        leave_out_unsaved(stored, state)
        check_fit(ranks, checkpoint, contents, state)
        state = read_state(ranks, checkpoint, contents, state)

        def apply() -> None:
            apply_state(state, model, None if weights_only else optimizer)
            if weights_only and optimizer is not None:
                optimizer.reload_model_params()
            if not weights_only:
                if scheduler is not None and run.scheduler is not None:
                    _load_scheduler(scheduler, run.scheduler)
                _load_rng(checkpoint, manifest, here, ranks.rank, seed)

        ranks.everywhere("apply what was read", apply)
    if ranks.rank == 0:
        logger.info(
            "loaded %s of %s (iteration %d)",
            "the weights" if weights_only else "all",
            checkpoint,
            manifest.iteration,
        )
    return LoadedCheckpoint(checkpoint, manifest.iteration, run.progress, run.config, same_layout)


def _choose(ranks: Agreement, path: Path, verify_hashes: bool) -> tuple[Path, Manifest]:
    """The best checkpoint that is not damaged."""
    candidates = ranks.on_first("look for checkpoints", lambda: find_candidates(path))
    checkpoint, manifest, fallback = choose_checkpoint(
        path, candidates, lambda checkpoint: _verify(ranks, checkpoint, verify_hashes)
    )
    if fallback is not None and ranks.rank == 0:
        logger.warning("checkpoint.load: %s", fallback)
    return checkpoint, manifest


def _verify(ranks: Agreement, checkpoint: Path, verify_hashes: bool) -> tuple[Manifest | None, list[str]]:
    """(manifest, what is wrong). Ranks share the reading of large files."""
    manifest, problems = ranks.on_first("read the manifest", lambda: find_problems(checkpoint))
    if manifest is not None and not problems and verify_hashes:
        share = share_of_rank(large_files(manifest), ranks.rank, ranks.world_size)
        parts = ranks.gather("verify files", lambda: find_wrong_hashes(checkpoint, manifest, share))
        problems = [problem for part in parts for problem in part]
    return manifest, problems


def _read_run(checkpoint: Path, expected_model: Mapping[str, Any], setting_of: Callable[[str], str]) -> _Run:
    config = _read_json(checkpoint / CONFIG_NAME)
    expected = json.loads(json.dumps(expected_model))
    differences = {setting_of(field): values for field, values in _differences(expected, config, "")}
    if differences:
        lines = [
            f"checkpoint.load: {checkpoint} is of another model:",
            *(f"{setting}: {values}" for setting, values in differences.items()),
        ]
        way = _WAY_TO_ANOTHER_MAP.format(checkpoint) if _MAP in differences else ""
        if all(setting.startswith(_POSITIONS) for setting in differences):
            way = _WAY_TO_OTHER_POSITIONS
        raise MismatchError(
            "\n  ".join(lines) + f"\nSet these fields as in the checkpoint, or load another one{way}"
        )
    scheduler = checkpoint / SCHEDULER_NAME
    return _Run(
        progress=_read_json(checkpoint / PROGRESS_NAME),
        config=config,
        scheduler=_read_json(scheduler) if scheduler.exists() else None,
    )


def _check_buckets(checkpoint: Path, saved: Layout, here: Layout) -> None:
    if any(getattr(saved, axis) != getattr(here, axis) for axis in ("tensor", "pipeline", "data", "stages")):
        raise MismatchError(
            f"checkpoint.load: {checkpoint} was saved by {saved} with checkpoint.optimizer_sharding "
            f"dp_reshardable, which can be loaded by the same layout only; this run has {here}. Use that "
            "layout, save once there with fully_reshardable, or set checkpoint.finetune to take the weights "
            "only"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ModelError as error:
        raise DamagedCheckpointError(f"checkpoint.load: {error}") from error


def _differences(expected: Any, stored: Any, field: str) -> Iterator[tuple[str, str]]:
    """(field, what it is on both sides)."""
    if isinstance(expected, dict) and isinstance(stored, dict):
        for key, value in expected.items():
            name = f"{field}.{key}" if field else key
            if key in stored:
                yield from _differences(value, stored[key], name)
            elif value is not False:  # what came later, and is off here, was not there
                logger.warning(
                    "the checkpoint does not say what %s was; this run has %s", name, json.dumps(value)
                )
    elif expected != stored:
        yield field, f"{json.dumps(stored)} in the checkpoint, {json.dumps(expected)} in this run"


def _load_scheduler(scheduler: OptimizerParamScheduler, state: dict[str, Any]) -> None:
    scheduler.num_steps = 0  # Megatron adds the saved steps to those already taken
    try:
        scheduler.load_state_dict(state)
    except AssertionError as error:
        raise MismatchError(
            f"checkpoint.load: the learning-rate schedule differs from that of the saved run: {error}. Set "
            "the fields of `optimizer` and train.train_iters as they were, or use checkpoint.finetune to "
            "start a new schedule"
        ) from error


def _load_rng(checkpoint: Path, manifest: Manifest, here: Layout, rank: int, seed: int) -> None:
    if manifest.layout == here:
        path = checkpoint / rng_file(rank)
        if rng_file(rank) not in manifest.files:
            raise DamagedCheckpointError(
                f"checkpoint.load: the manifest of {checkpoint} does not list {path}"
            )
        try:
            restore_rng_states(safetensors.torch.load(read_plain(path)))
        except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(
                f"checkpoint.load: {path} holds no random states: {error}"
            ) from error
        return
    reseed(seed, manifest.iteration)
    if rank == 0:
        logger.warning(_explain_reseeding(manifest.layout, here))


def _explain_reseeding(saved: Layout, here: Layout) -> str:
    return (
        f"the checkpoint was saved by {saved}, this run has {here}: random states are seeded "
        "anew, and the run goes on within rounding instead of bit for bit"
    )

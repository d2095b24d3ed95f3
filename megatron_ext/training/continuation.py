"""What has changed between the run that a checkpoint is of and the run that goes on from it."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from megatron_ext.command_line import config_to_dict
from megatron_ext.config import RunConfig
from megatron_ext.data.order import Continuation, TrainingOrder
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

ORDER_KEY = "training_order"
"""Where a checkpoint's progress keeps the order of its training data."""

_OF_THIS_START = ("checkpoint", "logging")
"""Sections that say nothing about the run itself."""
_OF_THE_ORDER = (
    "data.data_path", "data.train_data_path", "data.split", "data.mock", "train.seed", "train.seq_length",
)  # fmt: skip


def continuation_of(run: RunConfig, settings: Mapping[str, Any], progress: Mapping[str, Any]) -> Continuation:
    """From where `run` goes on in its training data, after a checkpoint with these settings and this
    progress. Rank 0 says which settings have changed.

    Raises ConfigError where an earlier version has not noted the order of the data, and it has changed.
    """
    changes = {key: pair for key, pair in _changes(settings, config_to_dict(run)) if pair[0] != pair[1]}
    if changes and dist.get_rank() == 0:
        logger.warning("%s", "\n".join(_told(run, changes, progress)))
    allowed, order = run.data.allow_changed_data, None
    if ORDER_KEY in progress:
        order = TrainingOrder.from_dict(progress[ORDER_KEY])
    elif int(progress["consumed_samples"]) and not allowed:
        of_order = [
            f"{key} was {old!r} and is {new!r}"
            for key, (old, new) in sorted(changes.items())
            if key in _OF_THE_ORDER
        ]
        if of_order:
            raise ConfigError(
                f"{'; '.join(of_order)}. The checkpoint is of an earlier version, which did not note where "
                "each dataset stands. Set that back; or start afresh from the weights with "
                "checkpoint.finetune; or set data.allow_changed_data to go on at the same number of samples: "
                "some text is then read twice, and some not at all."
            )
    return Continuation(int(progress["consumed_samples"]), order, allowed)


def _changes(before: object, after: object, key: str = "") -> Iterator[tuple[str, tuple[object, object]]]:
    """(dotted key, (old value, new value)) of all settings that both know."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in before.keys() & after.keys() - (set() if key else {*_OF_THIS_START}):
            yield from _changes(before[name], after[name], f"{key}.{name}" if key else name)
    else:
        yield key, (before, after)


def _told(
    run: RunConfig, changes: Mapping[str, tuple[object, object]], progress: Mapping[str, Any]
) -> Iterator[str]:
    yield "settings differ from those of the checkpoint:"
    yield from (f"  {key} was {old} and is {new}" for key, (old, new) in sorted(changes.items()))
    if changes.keys() & {"train.global_batch_size", "train.seq_length"}:
        train, done = run.train, int(progress["iteration"])
        left = max(0, train.train_iters - done)
        tokens = left * train.global_batch_size * train.seq_length
        yield (
            "  train.train_iters and the learning rate's schedule count iterations: the "
            f"{left:,} from here on read {tokens:,} tokens, after {int(progress['consumed_tokens']):,} so far"
        )

"""Weights that do not lie in a checkpoint, on the layout of a run: from any source of tensors."""

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedBase

from lckv.weights.tensors import TensorInfo, TensorSource, row_chunks
from megatron_ext.checkpointing.agreement import Agreement
from megatron_ext.checkpointing.state import apply_state, fill_state, sharded_state


def load_weights(ranks: Agreement, source: TensorSource, stage: torch.nn.Module) -> None:
    """Fills this rank's stage from `source`, which has the whole tensors of the model under the keys of a
    checkpoint, vocabularies without padding. The dtypes of the stage stay. All ranks call it together.

    A rank reads the rows that it needs, some at a time; ranks share the reading of what they hold copies of.
    """
    state = ranks.everywhere(
        "prepare loading", lambda: sharded_state([stage], None, stored=source.infos().keys())
    )
    state = fill_state(ranks, state, lambda entries: fill_entries(entries, source), dict)
    ranks.everywhere("apply what was read", lambda: apply_state(state, [stage], None))


def fill_entries(entries: Iterable[ShardedBase], source: TensorSource) -> None:
    """Fills the tensors of these entries where they lie. No collective."""
    infos = source.infos()
    for entry in entries:
        assert isinstance(entry, ShardedTensor) and not entry.prepend_axis_num, entry
        _fill(entry, source, infos[entry.key])


def _fill(entry: ShardedTensor, source: TensorSource, stored: TensorInfo) -> None:
    fits = tuple(entry.global_shape) == stored.shape
    assert fits or (entry.allow_shape_mismatch and entry.global_shape[1:] == stored.shape[1:]), entry
    target, first = entry.data.detach(), entry.global_offset[0]
    columns = tuple(
        slice(start, start + count)
        for start, count in zip(entry.global_offset[1:], target.shape[1:], strict=True)
    )
    there = max(0, min(len(target), stored.shape[0] - first))
    target[there:].zero_()  # padding of a vocabulary
    for rows in row_chunks(TensorInfo((there, *stored.shape[1:]), stored.dtype)):
        read = source.read(entry.key, slice(first + rows.start, first + rows.stop))
        target[rows] = read[(slice(None), *columns)].to(target.device, target.dtype)

"""A micro-batch as the model takes it, derived from tokens and labels alone.

b = sequences, s = tokens of a sequence, n = documents (parts of documents) in the micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config import DataConfig
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """A micro-batch, all on one device but for the bounds of documents."""

    tokens: Tensor
    """int64 [b, s]: what the model reads."""

    labels: Tensor
    """int64 [b, s]: the token after each."""

    loss_mask: Tensor
    """float32 [b, s]: 1 where the prediction of the label counts, else 0."""

    position_ids: Tensor
    """int64 [b, s]: position of each token in its row; in its document with `data.reset_position_ids`, and
    always in its conversation."""

    cu_seqlens: Tensor | None
    """int32 [n + 1] on the host, with `data.reset_attention_mask` and for conversations: where each document
    begins among the b * s tokens flattened row by row, and b * s at the end (`lckv.attention`'s Documents). A
    row always ends a document. A query sees no key of another document."""

    sample_ids: tuple[int, ...] = ()
    """Number of each row in the dataset: what the randomness of KV policies depends on."""

    counted: Tensor | None = None
    """bool [b, s]: tokens that are not padding; None where none is."""


def make_batch(
    samples: Mapping[str, Tensor], data: DataConfig, eod: int | None, device: torch.device | str
) -> Batch:
    """Complete `samples` ("tokens" and "labels", int64 [b, s]) to a batch on `device`.

    A document ends with its `eod` token; the next token begins another. Where samples say where documents
    begin ("begins", bool [b, s]), these are conversations, and none sees another. Labels and positions follow
    Megatron's eod_mask_loss (no loss on predicting what comes after an eod) and reset_position_ids. Negative
    tokens are padding: they get no loss, and 0 takes their place. Everything is computed where the samples
    are, normally on the CPU, so that no device has to be waited for. Raises ConfigError if a setting needs
    `eod` but there is none.
    """
    asked = [n for n in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask") if getattr(data, n)]
    if asked and eod is None:
        raise ConfigError(
            f"data.{asked[0]}=true needs to know the end-of-document token; set data.tokenizer_type and "
            "data.tokenizer_model."
        )
    tokens, labels = samples["tokens"].long(), samples["labels"].long()
    loss_mask = labels >= 0
    if data.eod_mask_loss:
        loss_mask = loss_mask & (tokens != eod)
    are_packed = "begins" in samples
    begins = samples["begins"] if are_packed else _begins(tokens, eod)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if are_packed or data.reset_position_ids:
        positions = positions - torch.where(begins, positions, 0).cummax(dim=1).values
    padding = tokens < 0
    cu_seqlens = None
    if are_packed or data.reset_attention_mask:
        starts = begins.flatten().nonzero().squeeze(1)
        cu_seqlens = torch.cat([starts, starts.new_tensor([tokens.numel()])]).cpu().int()
    return Batch(
        tokens=_move(tokens.clamp(min=0), device),
        labels=_move(labels.clamp(min=0), device),
        loss_mask=_move(loss_mask.float(), device),
        position_ids=_move(positions.contiguous(), device),
        cu_seqlens=cu_seqlens,
        sample_ids=tuple(samples["sample_ids"].tolist()) if "sample_ids" in samples else (),
        counted=_move(~padding, device) if padding.any() else None,
    )


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To `device`; from the host to a GPU without waiting, which pinned memory alone allows."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _begins(tokens: Tensor, eod: int | None) -> Tensor:
    """Where documents begin among tokens [b, s], bool [b, s]: at the head of each row, and after `eod`."""
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 0] = True
    if eod is not None:
        begins[:, 1:] = tokens[:, :-1] == eod
    return begins

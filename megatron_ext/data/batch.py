"""A micro-batch as the model takes it, derived from tokens and labels alone.

b = sequences, s = tokens of a sequence, n = documents (parts of documents) in the micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.policies.config import Reach
from megatron_ext.config import DataConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.chunks import ChunkRows, Chunks, chunk_rows


@dataclass(frozen=True)
class Batch:
    """A micro-batch, all on one device but for the bounds of documents. With context parallelism s are the
    tokens of a sequence that the rank has."""

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
    begins among the tokens of whole sequences, flattened row by row, and their number at the end
    (`lckv.attention`'s Documents). A row always ends a document. A query sees no key of another document."""

    sample_ids: tuple[int, ...] = ()
    """Number of each row in the dataset: what the randomness of KV policies depends on."""

    counted: Tensor | None = None
    """bool [b, s]: tokens that are not padding; None where none is."""

    chunk_rows: ChunkRows | None = None
    """For the KV policy, with context parallelism; None: the sequences are whole."""

    def documents(self) -> Documents | None:
        """Those of whole sequences, on the device of the tokens; None: a row is one."""
        if self.cu_seqlens is None:
            return None
        return Documents.at(self.cu_seqlens.tolist(), self.tokens.device)

    def of_rank(self, chunks: Chunks, reach: Reach | None) -> "Batch":
        """What a rank has of whole sequences, for a KV policy of this `reach`."""
        if chunks.ranks == 1:
            return self
        assert reach is not None, "refused by validation"
        begins = torch.zeros_like(self.tokens, dtype=torch.bool)
        begins[:, 0] = True
        if self.cu_seqlens is not None:
            begins.view(-1)[self.cu_seqlens[:-1].long()] = True
        return replace(
            self,
            tokens=chunks.own(self.tokens, 1),
            labels=chunks.own(self.labels, 1),
            loss_mask=chunks.own(self.loss_mask, 1),
            position_ids=chunks.own(self.position_ids, 1),
            counted=None if self.counted is None else chunks.own(self.counted, 1),
            chunk_rows=chunk_rows(chunks, reach, self.position_ids, begins, self.counted),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """All but the bounds of documents on `device`; from the host to a GPU without waiting."""
        return _moved(self, device)


def make_batch(
    samples: Mapping[str, Tensor],
    data: DataConfig,
    eod: int | None,
    device: torch.device | str,
    chunks: Chunks | None = None,
    reach: Reach | None = None,
) -> Batch:
    """Complete `samples` ("tokens" and "labels", int64 [b, s]) to a batch on `device`.

    A document ends with its `eod` token; the next token begins another. Where samples say where documents
    begin ("begins", bool [b, s]), these are conversations, and none sees another. Labels and positions follow
    Megatron's eod_mask_loss (no loss on predicting what comes after an eod) and reset_position_ids. Negative
    tokens are padding: they get no loss, and 0 takes their place. Everything is computed where the samples
    are, normally on the CPU, so that no device has to be waited for. With context parallelism the batch is
    what this rank has of the sequences (`chunks`), for a KV policy of this `reach`. Raises ConfigError if a
    setting needs `eod` but there is none.
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
    batch = Batch(
        tokens=tokens.clamp(min=0),
        labels=labels.clamp(min=0),
        loss_mask=loss_mask.float(),
        position_ids=positions.contiguous(),
        cu_seqlens=cu_seqlens,
        sample_ids=tuple(samples["sample_ids"].tolist()) if "sample_ids" in samples else (),
        counted=~padding if padding.any() else None,
    )
    return batch.of_rank(chunks or Chunks(), reach).to(device)


def _moved(of_tensors: Any, device: torch.device | str) -> Any:
    """A dataclass with the tensors of its fields, and of those of its fields that are dataclasses, moved."""
    moved = {}
    for field in fields(of_tensors):
        value = getattr(of_tensors, field.name)
        if isinstance(value, ChunkRows):
            moved[field.name] = _moved(value, device)
        elif isinstance(value, Tensor) and field.name != "cu_seqlens":
            moved[field.name] = _move(value, device)
    return replace(of_tensors, **moved)


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

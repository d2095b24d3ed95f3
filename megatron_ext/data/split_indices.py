"""Building the indices of a split: which of its sources' documents, dealt out in which order."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ext.config import DataConfig
from megatron_ext.data.blends import (
    SPLITS,
    SplitSources,
    deal_all_samples,
    deal_samples,
    deal_without_repeats,
)
from megatron_ext.data.index_cache import cache_parent, cached_directory, save_array
from megatron_ext.data.indexed import read_index
from megatron_ext.data.order import Continuation, Source, TrainingOrder, continue_order
from megatron_ext.data.samples import DocumentRange, build_epochs, document_range
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)


def say_changes(notes: Iterable[str]) -> None:
    """Log, on rank 0, what has changed in the training data of a resumed run."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for note in notes:
            logger.warning("training data: %s", note)


@dataclass(frozen=True)
class SplitIndices:
    """One split while its indices are built."""

    data: DataConfig
    split: int
    sources: SplitSources
    seq_length: int
    seed: int
    resumed: Continuation | None

    def build(self, samples: int | None) -> dict[str, Any] | None:
        """Build the indices. Returns what `datasets` opens, as plain JSON; None if there is no sample
        and none is asked for."""
        ranges, weights = self._usable_ranges(samples)
        if not ranges:
            return None
        order, notes = continue_order(self._present_order(ranges, weights), self.resumed)
        say_changes(notes)
        wanted = None if samples is None else samples - order.first_sample
        per_epoch = [source.per_epoch for source in order.sources]
        before = [source.before for source in order.sources]
        counts, blend = [per_epoch[0] if wanted is None else wanted], None
        if len(ranges) > 1:
            source, number = self._deal(weights, per_epoch, wanted)
            counts = np.bincount(source, minlength=len(ranges)).tolist()
            depends_on = {
                "index_version": 2,
                "weights": weights,
                "per_epoch": per_epoch,
                "before": before,
                "samples": wanted,
            }
            number += np.array(before)[source]
            blend = str(self._save_blend(self._cache(ranges[0]), depends_on, source, number))
        lengths = np.add(before, counts).tolist()
        directories = [
            self._build_source(documents, length) for documents, length in zip(ranges, lengths, strict=True)
        ]
        sources = [
            {
                "prefix": documents.prefix,
                "directory": str(directory),
                "length": length,
                "per_epoch": documents.samples_per_epoch(self.seq_length),
            }
            for documents, directory, length in zip(ranges, directories, lengths, strict=True)
        ]
        inner = before[0] if blend is None else 0
        return {"sources": sources, "blend": blend, "inner": inner, "order": order.to_dict()}

    def _present_order(
        self, ranges: Sequence[DocumentRange], weights: Sequence[float] | None
    ) -> TrainingOrder:
        """The order of a run that begins."""
        per_epoch = [documents.samples_per_epoch(self.seq_length) for documents in ranges]
        sources = (
            Source(documents.prefix, documents.content, self.seed, self.seq_length, size, weight)
            for documents, size, weight in zip(ranges, per_epoch, weights or per_epoch, strict=True)
        )
        return TrainingOrder(0, tuple(sources))

    def _usable_ranges(self, samples: int | None) -> tuple[list[DocumentRange], Sequence[float] | None]:
        """The documents of each source, with its weight if weights are given.

        A source that counts by its size may turn out too small for one sample. Any other may not.
        """
        blend = self.sources.blend
        weights = blend.weights if len(blend.prefixes) > 1 else None
        ranges = [
            document_range(prefix, *self.sources.documents(read_index(prefix).sequences))
            for prefix in blend.prefixes
        ]
        small = [documents for documents in ranges if not documents.samples_per_epoch(self.seq_length)]
        if small and (weights is not None or (len(small) == len(ranges) and samples is not None)):
            raise ConfigError(self._too_small(small[0]))
        for documents in small:
            logger.warning("%s Its tokens are left out.", self._too_small(documents))
        return [documents for documents in ranges if documents.samples_per_epoch(self.seq_length)], weights

    def _too_small(self, documents: DocumentRange) -> str:
        share = f", its share by data.split={self.data.split}," if self.data.data_path else ""
        return (
            f"the {SPLITS[self.split]} split of {documents.prefix} has {documents.last - documents.first} "
            f"documents{share} with {documents.tokens} tokens in all, but one sample takes train.seq_length "
            f"+ 1 = {self.seq_length + 1}. Use more text, a shorter train.seq_length or other shares."
        )

    def _deal(
        self, weights: Sequence[float] | None, per_epoch: Sequence[int], samples: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if samples is not None:
            return deal_samples(weights or per_epoch, samples)
        return deal_all_samples(per_epoch) if weights is None else deal_without_repeats(weights, per_epoch)

    def _save_blend(
        self, cache: Path, depends_on: dict[str, Any], source: np.ndarray, number: np.ndarray
    ) -> Path:
        def build(directory: Path) -> None:
            save_array(directory / "source.npy", source)
            save_array(directory / "number.npy", number)

        return cached_directory(cache, f"blend-{SPLITS[self.split]}", depends_on, build)

    def _build_source(self, documents: DocumentRange, samples: int) -> Path:
        return build_epochs(
            self._cache(documents),
            documents,
            name=SPLITS[self.split],
            seq_length=self.seq_length,
            samples=samples,
            seed=(self.seed, self.split),
        )

    def _cache(self, documents: DocumentRange) -> Path:
        return cache_parent(self.data.data_cache_path, documents.prefix)

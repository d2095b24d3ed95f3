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
from megatron_ext.data.packed_samples import ChatSource
from megatron_ext.data.sample_sources import SampleSource, TextSource
from megatron_ext.data.samples import document_range
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
        usable, weights = self._usable_sources(samples)
        if not usable:
            return None
        order, notes = continue_order(self._present_order(usable, weights), self.resumed)
        say_changes(notes)
        wanted = None if samples is None else samples - order.first_sample
        per_epoch = [source.per_epoch for source in order.sources]
        before = [source.before for source in order.sources]
        counts, blend = [per_epoch[0] if wanted is None else wanted], None
        if len(usable) > 1:
            source, number = self._deal(weights, per_epoch, wanted)
            counts = np.bincount(source, minlength=len(usable)).tolist()
            depends_on = {
                "index_version": 2,
                "weights": weights,
                "per_epoch": per_epoch,
                "before": before,
                "samples": wanted,
            }
            number += np.array(before)[source]
            blend = str(self._save_blend(self._cache(usable[0].prefix), depends_on, source, number))
        lengths = np.add(before, counts).tolist()
        directories = [
            source.build(
                self._cache(source.prefix), name=SPLITS[self.split], samples=length, seed=self._seeds
            )
            for source, length in zip(usable, lengths, strict=True)
        ]
        sources = [
            {
                "prefix": source.prefix,
                "directory": str(directory),
                "length": length,
                "per_epoch": source.per_epoch,
            }
            for source, directory, length in zip(usable, directories, lengths, strict=True)
        ]
        inner = before[0] if blend is None else 0
        return {"sources": sources, "blend": blend, "inner": inner, "order": order.to_dict()}

    def _present_order(
        self, usable: Sequence[SampleSource], weights: Sequence[float] | None
    ) -> TrainingOrder:
        """The order of a run that begins."""
        weights = weights or [source.per_epoch for source in usable]
        sources = (
            Source(source.prefix, source.content, self.seed, self.seq_length, source.per_epoch, weight)
            for source, weight in zip(usable, weights, strict=True)
        )
        return TrainingOrder(0, tuple(sources))

    @property
    def _seeds(self) -> tuple[int, int]:
        return self.seed, self.split

    def _usable_sources(self, samples: int | None) -> tuple[list[SampleSource], Sequence[float] | None]:
        """The documents of each source, with its weight if weights are given.

        A source that counts by its size may turn out too small for one sample. Any other may not.
        """
        blend = self.sources.blend
        weights = blend.weights if len(blend.prefixes) > 1 else None
        sources = [self._source(prefix) for prefix in blend.prefixes]
        small = [source for source in sources if not source.per_epoch]
        if small and (weights is not None or (len(small) == len(sources) and samples is not None)):
            raise ConfigError(self._too_small(small[0]))
        for source in small:
            logger.warning("%s Its tokens are left out.", self._too_small(source))
        return [source for source in sources if source.per_epoch], weights

    def _source(self, prefix: str) -> SampleSource:
        first, last = self.sources.documents(read_index(prefix).sequences)
        if self.data.format == "pretraining":
            return TextSource(document_range(prefix, first, last), self.seq_length)
        return ChatSource(
            prefix,
            first,
            last,
            data=self.data,
            seq_length=self.seq_length,
            seed=self._seeds,
            parent=self._cache(prefix),
            name=SPLITS[self.split],
        )

    def _too_small(self, source: SampleSource) -> str:
        share = f", its share by data.split={self.data.split}," if self.data.data_path else ""
        return f"the {SPLITS[self.split]} split of {source.prefix} {source.shortage(share)}"

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

    def _cache(self, prefix: str) -> Path:
        return cache_parent(self.data.data_cache_path, prefix)

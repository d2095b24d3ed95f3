"""A dataset's part in a split: its documents, and how they are cut into samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_ext.data.samples import DocumentRange, build_epochs


class SampleSource(Protocol):
    """Documents of one dataset, about to become samples."""

    @property
    def prefix(self) -> str:
        """Of the dataset."""

    @property
    def content(self) -> str:
        """Hash of all that the samples consist of: another one means other samples."""

    @property
    def per_epoch(self) -> int:
        """Samples in an epoch; 0: too few documents for one."""

    def shortage(self, share: str) -> str:
        """What it has and what a sample takes, where it has too little for one: the rest of a sentence, with
        `share`, which says what part of the dataset it is; and the way out."""

    def build(self, parent: Path, *, name: str, samples: int, seed: tuple[int, ...]) -> Path:
        """Build, or find in `parent`, the index of `samples` samples. Returns its directory."""


@dataclass(frozen=True)
class TextSource:
    """Texts, laid end to end and cut every `seq_length` tokens (`samples`)."""

    documents: DocumentRange
    seq_length: int

    @property
    def prefix(self) -> str:
        """`SampleSource.prefix`."""
        return self.documents.prefix

    @property
    def content(self) -> str:
        """`SampleSource.content`."""
        return self.documents.content

    @property
    def per_epoch(self) -> int:
        """`SampleSource.per_epoch`."""
        return self.documents.samples_per_epoch(self.seq_length)

    def shortage(self, share: str) -> str:
        """`SampleSource.shortage`."""
        documents = self.documents
        return (
            f"has {documents.last - documents.first} documents{share} with {documents.tokens} tokens in all, "
            f"but one sample takes train.seq_length + 1 = {self.seq_length + 1}. Use more text, a shorter "
            "train.seq_length or other shares."
        )

    def build(self, parent: Path, *, name: str, samples: int, seed: tuple[int, ...]) -> Path:
        """`SampleSource.build`."""
        return build_epochs(
            parent, self.documents, name=name, seq_length=self.seq_length, samples=samples, seed=seed
        )

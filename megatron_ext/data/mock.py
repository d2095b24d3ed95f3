"""Random documents for dry runs: no files, and yet a loss that falls."""

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.samples import Origin


class MockSamples(torch.utils.data.Dataset):
    """`length` samples full of documents that count upwards from a random token, around the vocabulary.

    Documents have 1 to about seq_length tokens, a quarter of it on average, and end with `eod` if there is
    one. A sample depends on the seed and its number only.
    """

    def __init__(
        self, *, length: int, seq_length: int, vocab_size: int, eod: int | None, seed: tuple[int, ...]
    ) -> None:
        self._length = length
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._eod = eod
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self._check(index)
        size = self._seq_length + 1
        random = np.random.default_rng([*(number % 2**32 for number in self._seed), index])
        ends = random.random(size) < 4 / size
        document = np.concatenate([[0], np.cumsum(ends[:-1])])
        first_token = random.integers(self._vocab_size, size=size)[document]
        values = self._vocab_size - (self._eod is not None)
        text = (first_token + np.arange(size)) % max(values, 1)
        if self._eod is not None:
            text += text >= self._eod
            text[ends] = self._eod
        tokens = torch.from_numpy(text.astype(np.int64))
        return {"tokens": tokens[:-1], "labels": tokens[1:]}

    def origin(self, index: int) -> Origin:
        """`SampleDataset.origin`: each sample counts as a document of the dataset "data.mock"."""
        self._check(index)
        return Origin("data.mock", index, 0)

    def _check(self, index: int) -> None:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length} mock samples")

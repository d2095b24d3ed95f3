"""Numbers about an indexed dataset that training can be judged by."""

import numpy as np

from megatron_ext.data.indexed import read_index, token_chunks
from megatron_ext.errors import ConfigError


def unigram_entropy(prefix: str) -> float:
    """Entropy of the frequencies of the tokens in a dataset, in nats per token.

    It is the loss of the best model that knows how frequent each token is, but nothing of its context. Raises
    ConfigError if the dataset is damaged or empty.
    """
    info = read_index(prefix)
    if not info.tokens:
        raise ConfigError(f"dataset {prefix} holds no token.")
    counts = np.zeros(0, np.int64)
    for tokens in token_chunks(prefix, info):
        of_chunk = np.bincount(tokens, minlength=len(counts))
        of_chunk[: len(counts)] += counts
        counts = of_chunk
    shares = counts[counts > 0] / info.tokens
    return float(-(shares * np.log(shares)).sum())

"""How a dataset of conversations says which of its tokens are learned: a token t that is read only, not
learned, is stored as -1 - t. So such a dataset is never mistaken for a text, and lengths stay those of the
tokens."""

import numpy as np

from megatron_ext.config import DataFormat
from megatron_ext.data.indexed import token_dtype

MARKED_DTYPE = np.dtype(np.int32)


def stored_dtype(data_format: DataFormat, vocab_size: int) -> np.dtype:
    """Type of a stored token."""
    return MARKED_DTYPE if data_format == "chat" else token_dtype(vocab_size)


def marked(tokens: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Tokens int [n] as they are stored, int32 [n], where `learned`, bool [n], says which are learned."""
    return np.where(learned, tokens, -1 - tokens).astype(MARKED_DTYPE)


def unmarked(stored: np.ndarray) -> np.ndarray:
    """The tokens [n] behind stored ones [n]; those of a text are themselves."""
    return stored if stored.dtype.kind == "u" else np.maximum(stored, -1 - stored)

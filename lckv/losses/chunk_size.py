"""How many tokens' logits are in memory at a time. Torch is not loaded here."""

CHUNK_BYTES = 1 << 26
"""Of a chunk's logits, unless a number of tokens is asked for."""


def tokens_of_chunk(rows: int, *, asked: int = 0, number_bytes: int = 4) -> int:
    """For logits of `rows` tokens of the vocabulary, numbers of so many bytes. `asked`: 0 leaves it to the
    memory."""
    return asked or max(1, CHUNK_BYTES // (rows * number_bytes))

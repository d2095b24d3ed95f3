"""Heads that kernels on CUDA take. Torch is not loaded."""

LARGEST_BIASED_HEAD = 256
"""Channels of a key whose last one is its bias, in 16 bits."""


def obstacle_to_biased_keys(channels: int, *, float32: bool) -> str | None:
    """What keeps kernels on CUDA from taking keys and queries
    of so many channels; None if nothing does."""
    if channels % 8 == 0 and (float32 or channels <= LARGEST_BIASED_HEAD):
        return None
    return f"on CUDA it must be a multiple of 8 and, in 16 bits, at most {LARGEST_BIASED_HEAD}"

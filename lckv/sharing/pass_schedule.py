"""How many passes without gradient each step of a training runs."""

import hashlib
from typing import Literal

PassSchedule = Literal["constant", "falling", "rising", "random"]


def forward_passes_at(
    schedule: PassSchedule, least: int, most: int, *, iteration: int, iterations: int, seed: int
) -> int:
    """m of step `iteration`, from 0, of `iterations`.

    constant: `most`. falling: from `most` to `least`, rising: the other way round, every number for equally
    many steps. random: any number from `least` to `most`, drawn from `seed` and `iteration` alone, so that
    every process, and a run that goes on, draws the same.
    """
    numbers = most - least + 1
    if schedule == "random":
        digest = hashlib.blake2b(repr((seed, iteration)).encode(), digest_size=8).digest()
        return least + int.from_bytes(digest) % numbers
    done = min(numbers - 1, iteration * numbers // iterations)
    if schedule == "falling":
        return most - done
    return least + done if schedule == "rising" else most

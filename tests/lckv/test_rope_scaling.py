"""What is said of scalings of the rotary embedding, and how far they reach."""

import math

import pytest

from lckv.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Scaling,
    YarnScaling,
    in_words,
    longest_context,
)


@pytest.mark.parametrize(
    ("scaling", "words", "longest"),
    [
        (None, "not scaled", 8192),
        (LinearScaling(2.0), "scaled by 2, linear", 8192),
        (
            Llama3Scaling(8.0, 1.0, 4.0, 4096),
            "scaled by 8, llama3: frequency factors 1 and 4, originally 4,096 positions",
            8192,
        ),
        (DynamicScaling(2.5), "scaled by 2.5, dynamic: its base grows beyond 8,192 positions", 20480),
        (DynamicScaling(math.nan), "scaled by nan, dynamic: its base grows beyond 8,192 positions", 8192),
        (
            YarnScaling(4.0, 2048),
            "scaled by 4, yarn: originally 2,048 positions, attention factor 1.13863",
            8192,
        ),
        (
            LongRopeScaling((1.0,), (2.0,), 4096, attention_factor=1.5),
            "longrope: other factors beyond 4,096 positions, attention factor 1.5",
            8192,
        ),
    ],
)
def test_in_words(scaling: Scaling | None, words: str, longest: int) -> None:
    assert in_words(scaling, 8192) == words
    assert longest_context(scaling, 8192) == longest

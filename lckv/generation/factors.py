"""By what logits are divided or multiplied: temperatures and the penalty of repetition. Torch is not loaded
here."""

import math

LEAST, MOST = 1e-15, 1e15
"""Beyond, logits in float32 may overflow, and two infinite ones have no softmax."""
RANGE = f"from {LEAST:g} to {MOST:g}"


def is_finite(value: object) -> bool:
    """Whether it is a number that a double can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def is_factor(value: object) -> bool:
    """Whether logits can be divided by it, and multiplied with it."""
    return is_finite(value) and LEAST <= value <= MOST  # type: ignore[operator]  # it is a number

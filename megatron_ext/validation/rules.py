"""Rules for the values of settings. Each yields a sentence for every setting that breaks it: name, value,
what is required.

None is a value that was not given and breaks no rule; nan breaks every one.
"""

import math
from collections.abc import Iterator


def at_least(section: str, config: object, least: int, *names: str) -> Iterator[str]:
    """`section.name` of `config` is `least` or more."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            yield f"{section}.{name} is {value}; it must be at least {least}."


def above_zero(section: str, config: object, *names: str) -> Iterator[str]:
    """`section.name` of `config` is greater than 0 and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{section}.{name} is {value}; it must be a number greater than 0."


def fraction(section: str, config: object, *names: str) -> Iterator[str]:
    """`section.name` of `config` lies in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            yield f"{section}.{name} is {value}; it must be at least 0 and less than 1."


def multiple(name: str, value: int, divisor_name: str, divisor: int, way_out: str) -> Iterator[str]:
    """`value` is a multiple of `divisor`; kept by definition where one of them is not positive."""
    if value > 0 and divisor > 0 and value % divisor:
        yield (
            f"{name} is {value} and {divisor_name} is {divisor}; the former must be a multiple of the "
            f"latter: {way_out}."
        )

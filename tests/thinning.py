"""Long tables of cases, of which continuous integration runs some every time and the others at night."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """The cases; all but each `every`-th are marked `nightly`. A tuple is one case of several values."""
    marked = []
    for place, case in enumerate(cases):
        marks = () if place % every == 0 else pytest.mark.nightly
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=marks))
    return marked

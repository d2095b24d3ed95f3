"""The plan of a prompt of which not all results are wanted.

Later tokens read keys and values of all tokens of a prompt; its logits are wanted of the last token, or of
none where more of the prompt is to come. So above the highest layer that computes keys and values only wanted
tokens go on, and of that layer itself the others need nothing but keys and values:

    0s_1s_2_2_2        all tokens   wanted ones
    layer 3, 4                      whole
    layer 2            keys, values the rest
    layer 0, 1         whole

Below it hidden states of all tokens are needed, and so in all passes over a group but the last one: each
serves keys and values of all tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from lckv.sharing.plan import LayerRun, Part, Step


class Results(Enum):
    """Of which new tokens the hidden states above the last layer are wanted."""

    ALL = "all"

    SOME = "some"
    """Of some in each row."""

    NONE = "none"
    """Only keys and values are."""


def exit_early(steps: Sequence[Step], results: Results) -> tuple[Step, ...]:
    """The steps of a plan without what only results that are not wanted need."""
    narrowed = list(steps)
    for number in reversed(range(len(narrowed))):
        if results is Results.ALL:
            break
        runs = list(narrowed[number].runs)
        for place in reversed(range(len(runs))):
            runs[place], results = _narrowed(runs[place], results)
        narrowed[number] = replace(narrowed[number], runs=tuple(runs))
    return tuple(narrowed)


def _narrowed(run: LayerRun, results: Results) -> tuple[LayerRun, Results]:
    """What is left of a layer of whose tokens `results` are wanted, and of which tokens it wants those of the
    layer below."""
    if results is Results.ALL:
        return run, results
    below = Results.ALL if run.computes_kv else results
    if results is Results.SOME:
        return replace(run, part=Part.WANTED), below
    part = Part.KEYS_VALUES if run.computes_kv else Part.NOTHING
    return replace(run, part=part, reads=None, second=None), below

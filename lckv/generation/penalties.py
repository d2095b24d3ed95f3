"""Changes of logits, before temperature and filters, that depend on the request or on earlier tokens.

Row by row, since each has other tokens; few requests ask for any. Scores are float32 [b, V], for b rows and V
tokens of the vocabulary; they are changed in place.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MOST_BIAS = 100.0
"""Of `logit_bias`, in either direction, as in OpenAI's interface: such a token always comes, or never."""

MOST_PENALTY = 2.0
"""Of presence and frequency, in either direction, as in OpenAI's interface."""


def add_biases(row: Tensor, biases: Mapping[int, float]) -> None:
    """`biases`: token -> what is added to its logit. `row`: [V]."""
    tokens, values = _columns(row, biases)
    row[tokens] += values


def penalise_repetition(row: Tensor, penalty: float, previous: Sequence[int]) -> None:
    """Divides positive logits of `previous` tokens by `penalty` and multiplies negative ones with it (Keskar
    et al. 2019). `row`: [V]."""
    seen = torch.tensor(sorted(set(previous)), dtype=torch.int64, device=row.device)
    score = row[seen]
    row[seen] = torch.where(score > 0, score / penalty, score * penalty)


def penalise_answered(row: Tensor, presence: float, frequency: float, answered: Mapping[int, int]) -> None:
    """Takes from the logits of tokens that the answer has `presence` once and `frequency` for each time.
    `answered`: token -> how often it came. `row`: [V]."""
    tokens, times = _columns(row, answered)
    row[tokens] -= presence + frequency * times


def biases_by_token(given: Mapping[str, float]) -> dict[int, float]:
    """`logit_bias` as JSON has it, whose names are the tokens. Raises ValueError for a name that is none."""
    wrong = next((name for name in given if not _is_token(name)), None)
    if wrong is not None:
        raise ValueError(f"logit_bias has the name {wrong[:100]!r}; names must be tokens, such as '42'.")
    return {int(name): value for name, value in given.items()}


def _is_token(name: str) -> bool:
    """One way only to write a number, so that none comes twice."""
    return name.isascii() and name.isdigit() and len(name) < 19 and str(int(name)) == name


def _columns(row: Tensor, values: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(list(values), dtype=torch.int64, device=row.device),
        torch.tensor(list(values.values()), dtype=row.dtype, device=row.device),
    )

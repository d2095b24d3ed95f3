"""What transformers' collators say of sequences that are packed into the rows of a batch.

Shapes: b rows, s tokens, n sequences in the batch.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Arguments of a forward pass that say where sequences begin. All of them say it by themselves."""

    cu_seq_lens_q: Tensor | None = None
    """int [n + 1]: where each sequence starts in the b * s tokens, rows one after the other, and b * s."""

    cu_seq_lens_k: Tensor | None = None
    """The same."""

    max_length_q: int | None = None
    """Tokens of the longest sequence, or more."""

    max_length_k: int | None = None
    """The same."""

    seq_idx: Tensor | None = None
    """int [b, s]: the number of each token's sequence."""

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the arguments that were given."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def starts(self, rows: int, tokens: int, device: torch.device) -> Tensor | None:
        """bool [b, s]: tokens that begin a sequence; None where no argument says so.

        Raises ValueError for arguments that do not fit the batch or contradict each other."""
        lengths_given = self.cu_seq_lens_q is not None or self.cu_seq_lens_k is not None
        for name in ("max_length_q", "max_length_k"):
            if getattr(self, name) is not None and not lengths_given:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but no sequence boundaries are given; give "
                    "cu_seq_lens_q and cu_seq_lens_k, or leave it out."
                )
        named = [
            *((name, self._from_lengths(name, rows, tokens)) for name in ("cu_seq_lens_q", "cu_seq_lens_k")),
            ("seq_idx", self._from_index(rows, tokens)),
        ]
        first: tuple[str, Tensor] | None = None
        for name, starts in named:
            if starts is None:
                continue
            if first is not None and not torch.equal(first[1], starts):
                raise ValueError(
                    f"{name} and {first[0]} say otherwise where sequences begin; queries and keys are the "
                    "same tokens here: give one of them, or make them agree."
                )
            first = first or (name, starts)
        return None if first is None else first[1].to(device)

    def _from_lengths(self, name: str, rows: int, tokens: int) -> Tensor | None:
        given = getattr(self, name)
        if given is None:
            return None
        bounds = torch.as_tensor(given).flatten().tolist()
        ends = bounds[:1] == [0] and bounds[-1:] == [rows * tokens]
        missing = sorted({row * tokens for row in range(rows)} - set(bounds))
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if not ends or missing or min(lengths) < 1:
            raise ValueError(
                f"{name} is {_short(bounds)}; for {rows} rows of {tokens} tokens it must rise from 0 to "
                f"{rows * tokens}, and every row must begin a sequence."
            )
        limit = getattr(self, f"max_length_{name[-1]}")
        if limit is not None and max(lengths) > int(limit):
            raise ValueError(
                f"max_length_{name[-1]} is {int(limit)}, but {name} has a sequence of {max(lengths)} tokens; "
                "give the length of the longest one, or leave it out."
            )
        starts = torch.zeros(rows * tokens, dtype=torch.bool)
        starts[bounds[:-1]] = True
        return starts.view(rows, tokens)

    def _from_index(self, rows: int, tokens: int) -> Tensor | None:
        if self.seq_idx is None:
            return None
        if tuple(self.seq_idx.shape) != (rows, tokens):
            raise ValueError(
                f"seq_idx has shape {list(self.seq_idx.shape)}; it must be [{rows}, {tokens}], the number of "
                "each token's sequence."
            )
        index = self.seq_idx.cpu()
        starts = torch.ones(rows, tokens, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        return starts


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:7]))}, ..., {numbers[-1]}]"

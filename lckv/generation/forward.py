"""Runs the model on the next tokens of some sequences of the cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.cache.paged import PagedCache
from lckv.generation.prefill import Settling
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from lckv.sharing.early_exit import Results


class Forwarded(NamedTuple):
    """What came of the new tokens."""

    hidden_states: Tensor | None
    """[b, s, hidden] before the language-model head; of rows with fewer tokens, the first ones count. None
    where not all are wanted."""

    newest: Tensor | None
    """[b, hidden]: of each row's newest token; None where none are wanted."""

    passes: list[int] | None
    """Passes over iterated layers that each row needed; None where nothing was iterated."""


class Forward:
    """A model on a cache."""

    def __init__(self, model: LCKVLlamaForCausalLM, cache: PagedCache, *, tolerance: float) -> None:
        """`tolerance`: see `Settling`; 0: always all m + b passes."""
        self.model, self._cache, self._tolerance = model, cache, tolerance
        decoder = model.model
        self.iterated = decoder.layer_types.any_cyclic
        self._passes = decoder.forward_passes + decoder.backward_passes
        self._key_bias = decoder.policy.traits.key_bias
        self.compression_ratio = 1.0
        """Tokens per slot of all open sequences after the last call; see `PagedCache.compression_ratio`."""

    def __call__(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Sequence[int]],
        results: Results = Results.ALL,
    ) -> Forwarded:
        """Compute the next `tokens` of `sequences`, at least one of each, which the cache then holds.
        `results` are wanted of all of them, of each row's newest one (SOME), or none. Raises OutOfPagesError,
        with the cache as it was, if it has no room for them."""
        device = self.model.device
        counts = [len(row) for row in tokens]
        width = max(counts)
        padded = [[*row, *(0,) * (width - len(row))] for row in tokens]
        embedded = self.model.model.embed_tokens(torch.tensor(padded, device=device))
        lengths = torch.tensor(counts, device=device)[:, None]
        counted = None
        if min(counts) < width:
            counted = torch.arange(width, device=device) < lengths
        newest, wanted = lengths - 1, None
        if results is Results.NONE or (results is Results.SOME and width > 1):
            wanted = newest if results is Results.SOME else newest[:, :0]
        iteration, settling = self._iteration(len(tokens), width, counted, device)
        output = self.model.model.run(
            embedded, self._cache.rows(sequences), counted=counted, iteration=iteration, wanted=wanted
        )
        self.compression_ratio = self._cache.compression_ratio
        states = output.last_hidden_state
        assert states is not None
        passes = None
        if self.model.model.iterates(width):
            passes = [output.passes or 1] * len(tokens) if settling is None else settling.passes.tolist()
        if results is Results.NONE:
            return Forwarded(None, None, passes)
        if wanted is not None:
            return Forwarded(None, states[:, 0], passes)
        row = torch.arange(len(tokens), device=device)
        return Forwarded(states if results is Results.ALL else None, states[row, newest[:, 0]], passes)

    def newest_logits(self, forwarded: Forwarded, rows: Sequence[int]) -> Tensor:
        """[rows, V]: logits of the newest token of some rows."""
        assert forwarded.newest is not None, "results were not wanted"
        return self.model.lm_head(forwarded.newest[torch.tensor(rows, device=self.model.device)])

    def _iteration(
        self, rows: int, width: int, counted: Tensor | None, device: torch.device
    ) -> tuple[Iteration | None, Settling | None]:
        if not self.model.model.iterates(width):
            return None, None
        if self._tolerance == 0:
            return Iteration(self._passes), None
        settling = Settling(
            self._tolerance,
            self._passes,
            rows,
            counted,
            key_bias=self._key_bias,
            device=device,
            guessed=self.model.model.first_guess,
        )
        return Iteration(self._passes, settling), settling

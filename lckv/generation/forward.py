"""Runs the model on the next tokens of some sequences of the cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.cache.paged import PagedCache
from lckv.cache.paged_step import PagedStep
from lckv.cache.undecided import UndecidedCache
from lckv.generation.prefill import Settling
from lckv.generation.step_graphs import Capture, StepGraphs
from lckv.models.decoding import Decoder
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

    logits: Tensor | None = None
    """[b, V] of each row's newest token, where they came with the step; overwritten by the next one."""


class Verifiable(NamedTuple):
    """What came of new tokens that may be wrong."""

    hidden_states: Tensor
    """[n, hidden] before the language-model head: of all new tokens of the first row, then of the second."""

    cache: UndecidedCache
    """Has the new tokens; the sequences have not."""


class Forward:
    """A model on a cache."""

    def __init__(
        self,
        model: LCKVLlamaForCausalLM,
        cache: PagedCache,
        *,
        tolerance: float,
        capture: Capture | None = None,
    ) -> None:
        """`tolerance`: see `Settling`; 0: always all m + b passes. `capture`: what captures steps of one
        token per row, to launch them as a whole; None: their operators are launched one by one."""
        self.model, self._cache, self._tolerance = model, cache, tolerance
        decoder = model.model
        self.iterated = decoder.layer_types.any_cyclic
        self._passes = decoder.forward_passes + decoder.backward_passes
        self._key_bias = decoder.policy.traits.key_bias
        self._decoder = Decoder(decoder)
        self._steps: dict[int, PagedStep] = {}
        self._graphs = None if capture is None else StepGraphs(model, self._decoder, cache, capture)
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
        # Without results the upper layers are not needed, which a step runs.
        if results is not Results.NONE and all(len(row) == 1 for row in tokens) and self._decoder.serves():
            stepped = self._step(sequences, [row[0] for row in tokens], results)
            if stepped is not None:
                self.compression_ratio = self._cache.compression_ratio
                return stepped
        embedded, lengths, counted = self._embedded(tokens)
        device, width = embedded.device, embedded.shape[1]
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

    def _step(self, sequences: Sequence[int], tokens: Sequence[int], results: Results) -> Forwarded | None:
        """One more token of each of `sequences`; None where that takes what a step has not."""
        rows = len(sequences)
        if self._graphs is not None and results is not Results.ALL:
            logits = self._graphs(sequences, tokens)
            return None if logits is None else Forwarded(None, None, None, logits)
        if rows not in self._steps:
            self._steps[rows] = self._cache.step(rows)
        step = self._steps[rows]
        if not step.plan(sequences):
            return None
        states = self._decoder(torch.tensor(tokens, device=step.positions.device), step)
        step.settle()
        return Forwarded(states[:, None] if results is Results.ALL else None, states, None)

    def verifiable(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]]) -> Verifiable:
        """Compute the next `tokens` of `sequences`, of which `take_in` takes in those that prove right. Every
        token comes out as if it were computed alone: maps that iterate run as many
        passes as a row has tokens, after which token i, which needs i passes, is exact."""
        embedded, _, counted = self._embedded(tokens)
        cache, width = UndecidedCache(self._cache.rows(sequences)), embedded.shape[1]
        iteration = Iteration(width) if self.model.model.iterates(width) else None
        output = self.model.model.run(embedded, cache, counted=counted, iteration=iteration)
        states = output.last_hidden_state
        assert states is not None
        return Verifiable(states.flatten(0, 1) if counted is None else states[counted], cache)

    def take_in(self, verifiable: Verifiable, counts: Sequence[int]) -> None:
        """Let each sequence have the first `counts` of its new tokens. Raises as `__call__`."""
        verifiable.cache.take_in(counts)
        self.compression_ratio = self._cache.compression_ratio

    def newest_logits(self, forwarded: Forwarded, rows: Sequence[int]) -> Tensor:
        """[rows, V]: logits of the newest token of some rows."""
        newest = forwarded.newest if forwarded.logits is None else forwarded.logits
        assert newest is not None, "results were not wanted"
        if len(rows) < len(newest):
            newest = newest[torch.tensor(rows, device=newest.device)]
        return self.model.lm_head(newest) if forwarded.logits is None else newest

    def _embedded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows side by side: embeddings [b, s, hidden], lengths int64 [b, 1], and bool [b, s] what is not
        padding (None: all)."""
        device, counts = self.model.device, [len(row) for row in tokens]
        width = max(counts)
        padded = [[*row, *(0,) * (width - len(row))] for row in tokens]
        embedded = self.model.model.embed_tokens(torch.tensor(padded, device=device))
        lengths = torch.tensor(counts, device=device)[:, None]
        return (
            embedded,
            lengths,
            None if min(counts) == width else torch.arange(width, device=device) < lengths,
        )

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

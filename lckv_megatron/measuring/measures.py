"""What is timed: reading a prompt, the time to an answer's first token,
and a step of decoding for a whole batch."""

from collections.abc import Sequence
from random import Random

import torch

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.forward import Forward
from lckv.generation.sampling import SamplingParams, sample
from lckv.sharing.early_exit import Results
from lckv_megatron.measuring.admission import Committed, cache_for, fill
from lckv_megatron.measuring.subjects import Subject

_GREEDY = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)


class Prefill:
    """Call it to compute a prompt in one piece, up to the logits of its last token, in an empty cache."""

    def __init__(
        self, subject: Subject, length: int, tolerance: float, results: Results = Results.SOME
    ) -> None:
        """`length`: of the prompt, in tokens. `tolerance`: see `lckv.generation.prefill.Settling`. `results`:
        what layers are computed for, ALL or SOME."""
        self._prompt = subject.prompts[0, :length].tolist()
        self.cache = cache_for(subject.model, 1, length)
        self._forward, self._results = Forward(subject.model, self.cache, tolerance=tolerance), results
        self.passes = 1
        """Over iterated layers, in the last call."""
        self.compression_ratio = 1.0
        """Tokens per slot, in the last call."""

    @torch.inference_mode()
    def __call__(self) -> None:
        sequence = self.cache.open()
        forwarded = self._forward([sequence], [self._prompt], self._results)
        self._forward.newest_logits(forwarded, [0])
        self.passes = forwarded.passes[0] if forwarded.passes is not None else 1
        self.compression_ratio = self.cache.compression_ratio
        self.cache.close(sequence)


class FirstToken:
    """Call it to hand a prompt to an idle engine and wait for one token."""

    def __init__(self, subject: Subject, length: int, tolerance: float) -> None:
        """See `Prefill`. Prompts are computed in the engine's chunks."""
        self._prompt = subject.prompts[0, :length].tolist()
        self._engine = Engine(
            subject.model,
            EngineConfig(max_batch_size=1, prefill_tolerance=tolerance),
            cache=cache_for(subject.model, 1, length + 1),
        )

    def __call__(self) -> None:
        self._engine.generate([self._prompt], _GREEDY)


class Decoding:
    """A batch of sequences of which each call computes one more token,
    which the prompts say, and draws the next."""

    def __init__(
        self,
        subject: Subject,
        batch: int,
        of_prompts: Sequence[Committed],
        *,
        max_tokens: int,
        memory_bytes: int | None = None,
    ) -> None:
        """`of_prompts`: what was committed of the beginning of each prompt; the sequences get up to
        `max_tokens`. `memory_bytes`: of the cache, default the most that they can need."""
        self.cache = cache_for(subject.model, batch, max_tokens, memory_bytes)
        self.sequences = fill(self.cache, batch, of_prompts)
        key = next(iter(of_prompts[0].values())).key
        self._prompts, self._tokens = subject.prompts[: len(of_prompts)].tolist(), len(key)
        self._forward = Forward(subject.model, self.cache, tolerance=0.0)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Where pages run out, the youngest sequence gives its own back, as in the engine."""
        while self.cache.pages_needed(self.sequences, 1) > self.cache.pages_free:
            self.cache.close(self.sequences.pop())
        rows = range(len(self.sequences))
        tokens = [[self._prompts[row % len(self._prompts)][self._tokens]] for row in rows]
        forwarded = self._forward(self.sequences, tokens)
        logits = self._forward.newest_logits(forwarded, rows)
        sample(logits, [_GREEDY] * len(rows), [Random(0)] * len(rows), tokens)
        self._tokens += 1

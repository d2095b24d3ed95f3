"""Steps of decoding that are launched as a whole: a step's operators are captured once for a bucket of rows
(1, 2, 4, ...), and launched again for every plan (`lckv.cache.paged_step`).

The first step of a bucket runs as it is, which also compiles and allocates what is made only once; the second
is captured. A bucket is captured anew where its lists of work have outgrown their room, which doubles.

Shapes: b rows, V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lckv.cache.paged import PagedCache
from lckv.cache.paged_step import Inputs, PagedStep
from lckv.models.decoding import Decoder
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM

Launch = Callable[[], Tensor]
Capture = Callable[[Launch], Launch]
"""From what launches operators one by one to what launches all of them and returns the same tensor. The
operators need not run meanwhile."""


def cuda_graph(run: Launch) -> Launch:
    """A `Capture` on CUDA, where the operators do not run meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class _Bucket:
    """Steps of up to `rows` sequences."""

    def __init__(self, cache: PagedCache, rows: int) -> None:
        self.step: PagedStep = cache.step(rows, fixed=True)
        self.tokens = Inputs([rows], self.step.positions.device)
        self.ran: tuple[int, ...] | None = None
        """The shape of steps that ran as they are."""
        self.captured: tuple[tuple[int, ...], Launch] | None = None
        """The shape of steps that can be launched as a whole, and how."""


class StepGraphs:
    """Steps of one model on one cache."""

    def __init__(
        self,
        model: LCKVLlamaForCausalLM,
        decoder: Decoder,
        cache: PagedCache,
        capture: Capture = cuda_graph,
    ) -> None:
        """`decoder`: that of `model`."""
        self._model, self._decoder, self._cache, self._capture = model, decoder, cache, capture
        self._buckets: dict[int, _Bucket] = {}

    def __call__(self, sequences: Sequence[int], tokens: Sequence[int]) -> Tensor | None:
        """Logits [b, V] of the next `tokens`, one of each of `sequences`, which the cache then holds; None,
        with the cache as it was, where `PagedStep.plan` has none. They are overwritten by the next step."""
        rows = 1 << (len(sequences) - 1).bit_length()
        if rows not in self._buckets:
            self._buckets[rows] = _Bucket(self._cache, rows)
        bucket = self._buckets[rows]
        step = bucket.step
        if not step.plan(sequences):
            return None
        bucket.tokens.take_back()
        (own,) = bucket.tokens.arrays
        own[: len(tokens)], own[len(tokens) :] = tokens, 0
        bucket.tokens.send()
        logits = self._launch(bucket)()
        step.settle()
        return logits[: len(sequences)]

    def _launch(self, bucket: _Bucket) -> Launch:
        step, (tokens,) = bucket.step, bucket.tokens.tensors

        def run() -> Tensor:
            return self._model.lm_head(self._decoder(tokens, step))

        def run_first() -> Tensor:
            logits = run()
            bucket.ran = step.shape  # which it has made
            return logits

        if bucket.captured is not None and bucket.captured[0] == step.shape:
            return bucket.captured[1]
        if bucket.ran != step.shape:
            return run_first
        launch = self._capture(run)
        bucket.captured = step.shape, launch
        return launch

"""Which requests run, and on which tokens, in the next step: first come, first served, as far as pages go.

A request is admitted when there are pages for its whole prompt, however little of it the policy will keep,
beside what those that run still need for theirs. What answers need is not known, so pages may run out: then
the youngest request gives its own back, waits in front of the others, and is computed again later.
"""

import threading
from collections import deque
from collections.abc import Sequence

from lckv.cache.paged import PagedCache
from lckv.generation.jobs import Job
from lckv.generation.requests import QueueFullError


class Scheduler:
    """Waiting and running requests, both from the oldest to the youngest. `add` may be called from any
    thread, the rest from one at a time."""

    def __init__(
        self,
        cache: PagedCache,
        *,
        max_batch_size: int,
        max_waiting: int,
        prefill_chunk: int,
        exact: bool,
        iterated: bool,
    ) -> None:
        """`prefill_chunk`: tokens, padding included, of prompts in one step. `exact`: prompts go token by
        token. `iterated`: computing several tokens at once is an approximation,
        which only prompts may be subject to."""
        self._cache, self._max_batch_size, self._max_waiting = cache, max_batch_size, max_waiting
        self._prefill_chunk, self._exact, self._iterated = prefill_chunk, exact, iterated
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Let a request wait. Raises QueueFullError if too many do."""
        with self._lock:
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting, and max_waiting is {self._max_waiting}; try "
                    "again when some are done."
                )
            self._waiting.append(job)

    def withdraw(self, job: Job) -> None:
        """Take a request out, whether it waits or runs; its pages are free again."""
        if job.sequence is not None:
            self._cache.close(job.sequence)
            self.running.remove(job)
            job.sequence = None
        else:
            with self._lock:
                self._waiting.remove(job)

    def admit(self) -> None:
        """Let waiting requests run."""
        while self._waiting and len(self.running) < self._max_batch_size:
            job = self._waiting[0]
            job.sequence = self._cache.open()
            together = [*self.running, job]
            # A page more for each, so that the next step does not need another one's.
            tokens = [len(member.tokens) - member.computed + self._cache.page_size for member in together]
            if self.running and not self._fits(together, tokens):
                self._cache.close(job.sequence)
                job.sequence = None
                return
            self.running.append(self._waiting.popleft())

    def decoding(self) -> list[Job]:
        """Those whose next token comes by itself."""
        return [job for job in self.running if self.chunk(job) == 1]

    def prefilling(self) -> list[Job]:
        """Those whose next chunk is computed in this step, the oldest first, as many as the padded chunks
        allow.

        A chunk is never cut to make room for another request's:
        what a request gets must not depend on its neighbours.
        """
        chosen: list[Job] = []
        width = 0
        for job in self.running:
            chunk = self.chunk(job)
            if chunk == 1:
                continue
            width = max(width, chunk)
            if chosen and width * (len(chosen) + 1) > self._prefill_chunk:
                break
            chosen.append(job)
        return chosen

    def chunk(self, job: Job) -> int:
        """Tokens that a request computes next."""
        if self._exact or job.one_by_one:
            return 1
        parallel = job.prompt_tokens if self._iterated else len(job.tokens)
        return max(1, min(parallel - job.computed, self._prefill_chunk))

    def make_room(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of some running requests that can compute their next chunk, after the youngest have made
        room. The only one that runs, if even it finds none, falls back to chunks of one token; and to
        nothing, when it is left out of the result."""
        jobs = list(jobs)
        while jobs and not self._fits(jobs, [self.chunk(job) for job in jobs]):
            if len(self.running) > 1:
                self._preempt(self.running[-1])
                jobs = [job for job in jobs if job.sequence is not None]
            elif self.chunk(jobs[0]) > 1:
                jobs[0].one_by_one = True
            else:
                return []
        return jobs

    def preempt_all(self) -> None:
        """Give all pages back."""
        while self.running:
            self._preempt(self.running[-1])

    def _preempt(self, job: Job) -> None:
        self.withdraw(job)
        job.preempt()
        self.preemptions += 1
        self._waiting.appendleft(job)

    def _fits(self, jobs: Sequence[Job], tokens: Sequence[int]) -> bool:
        sequences = [job.sequence for job in jobs if job.sequence is not None]
        return self._cache.pages_needed(sequences, tokens) <= self._cache.pages_free

"""Which requests run, and on which tokens, in the next step: first come, first served, as far as pages go.

A request begins from what is kept of requests before (`prefixes.py`), as far as they begin alike. Beginnings
are kept when a prompt or an answer is complete, and of long prompts whenever the tokens computed have
doubled: so at least half of what two prompts have in common is found. Where a request waits that begins as
one whose prompt is being computed, it lets others pass until that part is there.

A request is admitted when there are pages for its whole prompt, however little of it the policy will keep,
beside what those that run still need for theirs. What answers need is not known, so pages may run out: then
beginnings that are kept are forgotten, the least recently used first; and when there are none,
the youngest request gives its own pages back, waits in front of the others, and is computed again later.
"""

import threading
from collections import deque
from collections.abc import Sequence

from lckv.cache.paged import PagedCache
from lckv.generation.jobs import Job
from lckv.generation.prefixes import Prefixes, common_tokens
from lckv.generation.requests import QueueFullError


class Scheduler:
    """Waiting and running requests, both from the oldest to the youngest. `add` may be called from any
    thread, the rest from one at a time."""

    def __init__(
        self,
        cache: PagedCache,
        prefixes: Prefixes,
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
        self._cache, self._prefixes = cache, prefixes
        self._max_batch_size, self._max_waiting = max_batch_size, max_waiting
        self._prefill_chunk, self._exact, self._iterated = prefill_chunk, exact, iterated
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def prefixes(self) -> int:
        """Beginnings that are kept for later requests."""
        return len(self._prefixes)

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
        """Take a request out, whether it waits or runs; its pages are free again, or kept for others if it
        has ended well."""
        if job.sequence is not None:
            if job.finish_reason not in (None, "error"):
                self._prefixes.keep(job.tokens[: job.computed], job.sequence)
            self._cache.close(job.sequence)
            self.running.remove(job)
            job.sequence = None
        else:
            with self._lock:
                self._waiting.remove(job)

    def admit(self) -> None:
        """Let waiting requests run."""
        if len(self.running) >= self._max_batch_size:
            return
        with self._lock:
            waiting = list(self._waiting)
        for job in waiting:
            if self._waits_for_another(job):
                continue
            if len(self.running) >= self._max_batch_size or not self._begin(job):
                return

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
        if self._exact or job.one_by_one or job.computed == len(job.tokens) - 1:
            return 1
        parallel = job.prompt_tokens if self._iterated else len(job.tokens)
        if not self._cache.snapshots_shorten:
            parallel = min([parallel, *(stop for stop in job.stops if stop > job.computed)])
        return max(1, min(parallel - job.computed, self._prefill_chunk))

    def advance(self, job: Job, tokens: int) -> None:
        """A request has computed so many more tokens, without a fault: keep its prompt's beginning if it is
        time."""
        if job.computed > job.prompt_tokens:
            return
        wanted = any(job.computed - tokens < stop <= job.computed for stop in job.stops)
        if wanted or job.computed == job.prompt_tokens or job.computed >= 2 * job.kept:
            self._prefixes.keep(job.tokens[: job.computed], job.sequence_number)
            job.kept = job.computed

    def make_room(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of some running requests that can compute their next chunk, after the youngest have made
        room. The only one that runs, if even it finds none, falls back to chunks of one token; and to
        nothing, when it is left out of the result."""
        jobs = list(jobs)
        while jobs and not self._fits(jobs, [self.chunk(job) for job in jobs]):
            if len(self.running) > 1:
                self._preempt(self.running[-1])
                jobs = [job for job in jobs if job.sequence is not None]
            elif self.prefixes:  # some may hold what a window of its own has left behind
                self._prefixes.clear()
            elif self.chunk(jobs[0]) > 1:
                jobs[0].one_by_one = True
            else:
                return []
        return jobs

    def has_room(self, jobs: Sequence[Job], tokens: Sequence[int]) -> bool:
        """Whether some running requests can take in so many tokens each without another one's making room;
        beginnings that are kept are forgotten for it."""
        needed = self._pages_needed(jobs, tokens)
        return needed <= self._cache.pages_free + self._cache.pages_kept and self._prefixes.make_room(needed)

    def preempt_all(self, *, keep: bool) -> None:
        """Give all pages back. `keep`: keep what was computed, as long as nobody needs the pages."""
        while self.running:
            job = self.running[-1]
            if keep:
                self._prefixes.keep(job.tokens[: job.computed], job.sequence_number)
            self._preempt(job)

    def _preempt(self, job: Job) -> None:
        self.withdraw(job)
        job.preempt()
        self.preemptions += 1
        with self._lock:
            self._waiting.appendleft(job)

    def _begin(self, job: Job) -> bool:
        """Whether there is room for a waiting request, which then runs. If none runs, it does in any case."""
        beginning = self._prefixes.find(job.tokens, job.reusable)
        # A page more for each, so that the next step does not need another one's.
        tokens = len(job.tokens) - beginning.tokens + self._cache.page_size
        needed = self._cache.pages_to_begin(tokens, *beginning)
        if self.running:
            counts = [len(member.tokens) - member.computed + self._cache.page_size for member in self.running]
            needed += self._pages_needed(self.running, counts)
        if self.running and needed > self._cache.pages_free + self._cache.pages_kept:
            return False
        # From now on the pages that it begins with are its own too, and not among those that can be had.
        sequence = self._cache.open(*beginning)
        if self.running and not self._prefixes.make_room(needed):
            self._cache.close(sequence)
            return False
        job.begin(sequence, beginning.tokens)
        with self._lock:
            self._waiting.remove(job)
        self.running.append(job)
        return True

    def _waits_for_another(self, job: Job) -> bool:
        """Whether a request that runs is about to compute what this one begins with."""
        if job.may_follow and self._prefixes.enabled:
            job.follows = self._whom_to_follow(job)
            if job.follows is not None:
                job.may_follow = False
                leader, common = job.follows
                leader.stops.add(common)
        if job.follows is None:
            return False
        leader, common = job.follows
        return leader.sequence is not None and leader.computed < common

    def _whom_to_follow(self, job: Job) -> tuple[Job, int] | None:
        """The request that runs and will have the most in common with `job`, and how many tokens, if that is
        at least a page more than what is kept."""
        most = job.reusable
        best, least = None, self._prefixes.find(job.tokens, most).tokens + self._cache.page_size
        for leader in self.running:
            if leader.computed >= leader.prompt_tokens:
                continue
            common = min(most, common_tokens(job.tokens, leader.request.prompt_ids))
            if common < least:
                continue
            if leader.computed < common:
                best, least = (leader, common), common + 1
            elif self._cache.snapshots_shorten:
                self._prefixes.keep(leader.tokens[: leader.computed], leader.sequence_number)
                best, least = None, common + self._cache.page_size
        return best

    def _fits(self, jobs: Sequence[Job], tokens: Sequence[int]) -> bool:
        return self._prefixes.make_room(self._pages_needed(jobs, tokens))

    def _pages_needed(self, jobs: Sequence[Job], tokens: Sequence[int]) -> int:
        return self._cache.pages_needed([job.sequence_number for job in jobs], tokens)

"""The generation engine: many requests at once, each of which joins and leaves between two steps."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lckv.cache.paged import PagedCache
from lckv.generation.config import EngineConfig
from lckv.generation.drafting import PromptLookup
from lckv.generation.following import score_prompt
from lckv.generation.forward import Forward, Forwarded
from lckv.generation.grammars import Grammars
from lckv.generation.jobs import Job
from lckv.generation.limits import Limits, end_tokens, token_ids
from lckv.generation.memory import longest_sequence, paged_cache
from lckv.generation.prefixes import Prefixes
from lckv.generation.requests import Completion, QueueFullError, Request, TokenEvent
from lckv.generation.sampling import SamplingParams
from lckv.generation.scheduler import Scheduler
from lckv.generation.scoring import Scores, score
from lckv.generation.stats import Counters, EngineStats
from lckv.generation.step_graphs import cuda_graph
from lckv.generation.token_bytes import TokenBytes
from lckv.generation.verification import Verified, verify
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.sharing.early_exit import Results

logger = logging.getLogger(__name__)


_Outcome = tuple[Job, int, Verified]
"""Of a step for a request: the request, the tokens that the cache has taken in, and what the request gets."""


class Engine:
    """Answers requests with one model and one cache.

    One thread at a time runs `step`, again and again; any thread may call the other methods meanwhile. What a
    request gets depends on nothing but its prompt and parameters: in float32 its answer is the same alone,
    among others, after a preemption, and where it begins like a request before. (For maps that iterate: the
    same within `EngineConfig.prefill_tolerance`, since the request before may have computed the beginning in
    other chunks; with `prefill` "exact" it is the same.) Who changes the model's weights calls
    `clear_prefixes`.
    """

    def __init__(
        self,
        model: LCKVLlamaForCausalLM,
        config: EngineConfig | None = None,
        *,
        tokenizer: Any = None,
        cache: PagedCache | None = None,
    ) -> None:
        """`tokenizer`: transformers', for the answers' text and for stop texts. `cache`: default one of
        the size that `config` says.

        Raises ValueError for settings that make no sense, and where memory does not suffice.
        """
        config = config or EngineConfig()
        if config.problems():
            raise ValueError("\n".join(config.problems()))
        if config.cuda_graphs and model.device.type != "cuda":
            raise ValueError(
                f"cuda_graphs is set, but the model is on {model.device.type}; move it to a GPU, or leave "
                "cuda_graphs out."
            )
        self.model = model.eval()
        self.texts = None if tokenizer is None else TokenBytes(tokenizer)
        """What tokens are as text; None without a tokenizer."""
        context = min(model.config.longest_context, config.max_tokens or model.config.max_position_embeddings)
        self.cache = cache or paged_cache(
            model.config,
            dtype=model.dtype,
            device=model.device,
            memory_bytes=config.memory_bytes,
            page_size=config.page_size,
            max_sequences=config.max_batch_size,
            max_tokens=context,
        )
        context = min(context, self.cache.max_tokens + 1)  # the last token need not be computed
        # Otherwise what of a text is kept is not known before.
        keeps_all = model.model.policy.traits.keeps_every_token
        self.limits = Limits(
            vocabulary=model.config.vocab_size,
            context=context,
            prompt_tokens=min(context - 1, config.max_prompt_tokens or context),
            pages=self.cache.pages,
            pool_tokens=longest_sequence(self.cache, context) if keeps_all else context,
            has_tokenizer=tokenizer is not None,
        )
        self._ends = end_tokens(model)
        self.grammars = (
            None
            if self.texts is None
            else Grammars(self.texts, vocabulary=model.config.vocab_size, ends=self._ends)
        )
        """What answers can be held to; None without a tokenizer."""
        self._prefill_chunk = config.prefill_chunk
        self._draft_tokens = 0 if config.speculation == "none" else config.speculation_tokens
        self._match = config.speculation_match
        self._forward = Forward(
            model,
            self.cache,
            tolerance=config.prefill_tolerance,
            capture=cuda_graph if config.cuda_graphs else None,
        )
        self._prefixes = Prefixes(self.cache, enabled=config.prefix_cache)
        self._scheduler = Scheduler(
            self.cache,
            self._prefixes,
            max_batch_size=min(config.max_batch_size, self.cache.max_sequences),
            max_waiting=config.max_waiting,
            prefill_chunk=config.prefill_chunk,
            exact=config.prefill == "exact",
            iterated=self._forward.iterated,
        )
        self._counters = Counters()
        self._stepping = threading.Lock()
        self._lock = threading.Condition()  # of what follows
        self._jobs: dict[str, Job] = {}
        self._cancelled: list[Job] = []

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> Request:
        """Hand in a request. `on_token` is called for each of its events by the thread that runs `step` (or
        `cancel`) and must be quick; it may call `cancel` and `submit`, not `step`.

        Raises ValueError for what can never be answered, with every reason,
        and QueueFullError where too many requests wait.
        """
        prompt = token_ids(prompt_ids)
        problems = self.limits.request_problems(prompt, params)
        if problems:
            raise ValueError("\n".join(problems))
        request = Request(request_id or uuid.uuid4().hex, prompt, params, on_token)
        ends = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else self._ends)))
        most = min(self.limits.context, len(prompt) + params.max_new_tokens)
        job = Job(request, self.texts, ends=ends, max_tokens=most)
        if self._draft_tokens:
            job.drafter = PromptLookup(self._match)
        if params.grammar is not None and self.grammars is not None:
            job.constraint = self.grammars.compile(params.grammar).begin()
        with self._lock:
            if request.request_id in self._jobs:
                raise ValueError(
                    f"request_id {request.request_id!r} is that of a request that is not finished; give "
                    "another one, or none."
                )
            self._scheduler.add(job)
            self._jobs[request.request_id] = job
            self._lock.notify_all()
        return request

    def cancel(self, request_id: str) -> bool:
        """End a request; its pages are for others after the step that is running, if one is. False if there
        is none of that name (any more)."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is None or job in self._cancelled:
                return False
            self._cancelled.append(job)
        if self._stepping.acquire(blocking=False):  # otherwise the thread that steps sees to it
            try:
                self._end_cancelled()
            finally:
                self._stepping.release()
        return True

    @property
    def has_work(self) -> bool:
        """Whether there is a request that is not finished."""
        return bool(self._jobs)

    def wait_for_work(self, timeout: float) -> bool:
        """Sleep until there is a request, at most `timeout` seconds; `has_work`."""
        with self._lock:
            return self._lock.wait_for(lambda: bool(self._jobs), timeout)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Admit requests, give every answer that is under way its next token, compute a chunk of prompts;
        what came of it.

        A failure ends the requests that it hits with finish_reason "error", and no others.
        """
        with self._stepping:
            started = time.monotonic()
            events = self._end_cancelled()
            self._scheduler.admit()
            decoding, prefilling = self._scheduler.decoding(), self._scheduler.prefilling()
            for jobs in (decoding, prefilling):
                events += self._compute([job for job in jobs if job.sequence is not None])
            events += self._end_cancelled()
            self._counters.step(started, sum(event.token is not None for event in events))
            return events

    def run_until_idle(self) -> None:
        """Step until all requests are finished."""
        while self.has_work:
            self.step()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """The answers to `prompts`, in their order. Raises ValueError as `submit` does and RuntimeError if
        one fails; the others are then cancelled."""
        of_each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests: list[Request] = []
        try:
            for prompt, own_params in zip(prompts, of_each, strict=True):
                while True:
                    try:
                        requests.append(self.submit(prompt, own_params))
                        break
                    except QueueFullError:
                        self.step()
            while not all(request.finished for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request.request_id)
        completions = [request.result() for request in requests]
        for completion in completions:
            if completion.error is not None:
                raise RuntimeError(completion.error)
        return completions

    def score(self, token_lists: Sequence[Sequence[int]], *, token_by_token: bool = False) -> list[Scores]:
        """How probable each text of tokens is, computed through the cache; see `Scores`. What several texts
        begin with is computed once; nothing is taken from earlier requests. Requests that run are set aside
        meanwhile.

        Raises ValueError for texts that `submit` would refuse as prompts,
        but a text may be as long as the context.
        """
        texts = [token_ids(tokens) for tokens in token_lists]
        limits = self.limits
        problems = [
            problem
            for number, text in enumerate(texts)
            for problem in limits.text_problems(text, f"text {number}", limits.context)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        with self._stepping:
            self._scheduler.preempt_all(keep=True)
            return score(
                self._forward,
                self.cache,
                self._prefixes,
                texts,
                chunk=1 if token_by_token else self._prefill_chunk,
                tokens_at_once=self._prefill_chunk,
            )

    def clear_prefixes(self) -> None:
        """Forget what is kept for requests that begin like earlier ones; the pages are free."""
        with self._stepping:
            self._prefixes.clear()

    def stats(self) -> EngineStats:
        """What was done so far, and what is being done."""
        return self._counters.stats(self._scheduler, self.cache, self._forward.compression_ratio)

    def _compute(self, jobs: Sequence[Job]) -> list[TokenEvent]:
        """Compute the next chunk of some running requests, and a token for each whose tokens are all computed
        then; several for those whose drafts are right."""
        present = self._scheduler.make_room(jobs)
        events = [self._out_of_pages(job) for job in jobs if job.sequence is not None and job not in present]
        drafts = self._drafts(present)
        present = [job for job in present if job not in drafts]
        if drafts:
            events += self._finish(list(drafts), lambda: self._verify(drafts))
        if present:
            events += self._finish(present, lambda: self._choose(present))
        return events

    def _finish(self, jobs: Sequence[Job], compute: Callable[[], list[_Outcome]]) -> list[TokenEvent]:
        """Do `compute` for some running requests, and hand out what comes of it."""
        try:
            outcomes = compute()
        except Exception as error:  # whatever it is, the other requests go on
            logger.exception("the model failed on %d requests", len(jobs))
            problem = f"the model failed: {type(error).__name__}: {error}"
            return [self._fail(job, problem) for job in jobs]
        except BaseException:  # an interrupt; what the cache has taken in is not known for sure
            self._scheduler.preempt_all(keep=False)
            for job in jobs:
                if job.finish_reason is not None:
                    self._fail(job, "the step was interrupted before it handed out the end of the answer")
            raise
        events = []
        for job, count, result in outcomes:
            if result.problem is not None:
                events.append(self._fail(job, result.problem))
                continue
            self._scheduler.advance(job, count)
            if result.events and job.computed == job.prompt_tokens:
                self._counters.prompt(job.prompt_tokens, job.cached_tokens or 0, job.prefill_passes)
            events += [self._deliver(job, event) for event in result.events]
        return events

    def _choose(self, jobs: Sequence[Job]) -> list[_Outcome]:
        """Compute the next chunk of requests, and choose a token for each whose tokens are all computed."""
        counts = [self._scheduler.chunk(job) for job in jobs]
        forwarded = self._forward_chunks(jobs, counts)
        results = dict.fromkeys(jobs, Verified([], 0, None))
        ready = [row for row, job in enumerate(jobs) if job.computed == len(job.tokens)]
        if ready:
            logits = self._forward.newest_logits(forwarded, ready)
            of_ready = [jobs[row] for row in ready]
            results |= zip(of_ready, verify(dict.fromkeys(of_ready, ()), logits), strict=True)
        return [(job, count, results[job]) for job, count in zip(jobs, counts, strict=True)]

    def _drafts(self, jobs: Sequence[Job]) -> dict[Job, list[int]]:
        """Guesses for those requests that answer, as long as there is room for them; none of all if nobody
        has an idea."""
        if self._draft_tokens == 0:
            return {}
        drafts = {job: job.draft(self._draft_tokens) for job in jobs if job.answers}
        counts = [1 + len(drafts[job]) if job in drafts else self._scheduler.chunk(job) for job in jobs]
        return drafts if any(drafts.values()) and self._scheduler.has_room(jobs, counts) else {}

    def _verify(self, drafts: Mapping[Job, Sequence[int]]) -> list[_Outcome]:
        """Compute requests' newest tokens and drafts together, and take in what is right of them."""
        sequences = [job.sequence_number for job in drafts]
        chunks = [[job.tokens[-1], *draft] for job, draft in drafts.items()]
        forwarded = self._forward.verifiable(sequences, chunks)
        verified = verify(drafts, self.model.lm_head(forwarded.hidden_states))
        counts = [len(result.events) for result in verified]
        self._forward.take_in(forwarded, counts)
        for (job, draft), result, count in zip(drafts.items(), verified, counts, strict=True):
            job.computed += count
            self._counters.draft(len(draft), result.accepted)
        return list(zip(drafts, counts, verified, strict=True))

    def _forward_chunks(self, jobs: Sequence[Job], counts: Sequence[int]) -> Forwarded:
        """Compute the next `counts` tokens of some running requests."""
        sequences = [job.sequence_number for job in jobs]
        chunks = [
            job.tokens[job.computed : job.computed + count] for job, count in zip(jobs, counts, strict=True)
        ]
        forwarded = self._forward(sequences, chunks, _wanted(jobs, counts))
        for row, (job, count) in enumerate(zip(jobs, counts, strict=True)):
            if forwarded.hidden_states is not None:
                score_prompt(job, self.model.lm_head, forwarded.hidden_states[row, :count])
            job.computed += count
            if forwarded.passes is not None:
                job.prefill_passes = max(job.prefill_passes or 0, forwarded.passes[row])
        return forwarded

    def _out_of_pages(self, job: Job) -> TokenEvent:
        """The only request that runs has no room for one more token."""
        if len(job.tokens) > job.prompt_tokens:
            return self._deliver(job, job.end("length"))
        return self._fail(
            job,
            f"the prompt's {job.prompt_tokens} tokens do not fit into the cache, whose {self.cache.pages} "
            f"pages are full after {job.computed}; give the engine more memory_bytes.",
        )

    def _fail(self, job: Job, error: str) -> TokenEvent:
        logger.error("request %s: %s", job.request.request_id, error)
        return self._deliver(job, job.end("error"), error)

    def _end_cancelled(self) -> list[TokenEvent]:
        with self._lock:
            jobs, self._cancelled = self._cancelled, []
        return [self._deliver(job, job.end("cancelled")) for job in jobs if job.finish_reason is None]

    def _deliver(self, job: Job, event: TokenEvent, error: str | None = None) -> TokenEvent:
        """Hand out an event; after a request's last one it is gone from here."""
        if event.finish_reason is not None:
            self._scheduler.withdraw(job)
            with self._lock:
                del self._jobs[event.request_id]
            self._counters.end(event.finish_reason)
            job.request.finish(job.completion(error))
        if job.request.on_token is not None:
            try:
                job.request.on_token(event)
            except Exception:  # a listener's fault ends its own request only
                logger.exception("on_token of request %s failed; the request is cancelled", event.request_id)
                self.cancel(event.request_id)
        return event


def _wanted(jobs: Sequence[Job], counts: Sequence[int]) -> Results:
    """Of which of the next `counts` tokens of some requests logits are wanted."""
    if any(
        job.params.prompt_logprobs is not None and job.unscored(count)
        for job, count in zip(jobs, counts, strict=True)
    ):
        return Results.ALL
    ready = any(job.computed + count == len(job.tokens) for job, count in zip(jobs, counts, strict=True))
    return Results.SOME if ready else Results.NONE

"""What a run does around each of its steps, beside training: profiles, own times, Python's garbage."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron.core.transformer.module import MegatronModule

from megatron_ext.config import RunConfig
from megatron_ext.parallel.process_groups import end_start
from megatron_ext.training.garbage import manual_collection
from megatron_ext.training.profile import profiling
from megatron_ext.training.stragglers import own_times

Around = Callable[[int], AbstractContextManager[None]]
"""The context of the step of an iteration."""


@contextmanager
def around_steps(run: RunConfig, model: MegatronModule) -> Iterator[Around]:
    """While the context is open, which all ranks enter, each step is taken in what this yields."""
    is_start = True
    with (
        manual_collection(run.train.manual_gc_interval) as collect,
        profiling(run.profile, run.checkpoint.save) as profiler,
        own_times(run.profile.straggler_interval, model) as times,
    ):

        @contextmanager
        def around(iteration: int) -> Iterator[None]:
            nonlocal is_start
            with profiler.iteration(iteration):
                if times is not None:
                    times.begin()
                yield
            if times is not None:
                times.compare(iteration)
            collect(iteration)
            if is_start:
                end_start(run.parallel)
                is_start = False

        yield around

"""What cannot work when sequences are split over ranks (context parallelism). Neither torch nor Megatron is
loaded."""

from collections.abc import Iterator

from megatron_ext.config import RunConfig
from megatron_ext.validation.rules import at_least, multiple

_SIZE = "parallel.context_parallel_size"


def context_problems(run: RunConfig) -> Iterator[str]:
    """For sequences of any length."""
    size, policy = run.parallel.context_parallel_size, run.compression.policy
    yield from at_least("parallel", run.parallel, 1, "context_parallel_size")
    if size > 1 and policy.traits.reach is None:
        yield (
            f"{_SIZE} is {size} and compression.policy.name is {policy.name}; this policy does not say how "
            "far around a token it looks (Traits.reach), so that sequences cannot be cut: set the former to "
            "1, or choose another policy."
        )


def context_step_problems(run: RunConfig) -> Iterator[str]:
    """For the sequences of a run."""
    parallel, train = run.parallel, run.train
    size, length = parallel.context_parallel_size, train.seq_length
    if size <= 1 or length < 1:
        return
    if 0 < run.model.attention_dropout < 1:
        yield (
            f"{_SIZE} is {size} and model.attention_dropout is {run.model.attention_dropout}; attention of "
            "a chunk to what comes before it has no dropout: set the former to 1, or the latter to 0."
        )
    way_out = "every rank holds two chunks of each sequence, and all chunks have the same length"
    yield from multiple("train.seq_length", length, f"2 * {_SIZE}", 2 * size, way_out)
    if length % (2 * size):
        return
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and tensor > 0:
        way_out = "with parallel.sequence_parallel the tokens of a rank are split again"
        name = "parallel.tensor_model_parallel_size"
        yield from multiple(f"train.seq_length / {_SIZE}", length // size, name, tensor, way_out)
    yield from _reach_problems(run, length // (2 * size))


def _reach_problems(run: RunConfig, chunk: int) -> Iterator[str]:
    """A policy that looks further than the neighbours of a chunk."""
    policy = run.compression.policy
    reach = policy.traits.reach
    if reach is None:
        return
    furthest = max(reach.before, reach.after)
    if furthest > chunk:
        place = "in front of" if reach.before == furthest else "behind"
        yield (
            f"compression.policy.name is {policy.name}, with settings by which it looks at {furthest} tokens "
            f"{place} each token, and a chunk has {chunk} (train.seq_length {run.train.seq_length} / (2 * "
            f"{_SIZE} {run.parallel.context_parallel_size})); the former must be at most the latter: lower "
            f"{_SIZE}, raise train.seq_length, or change the policy's settings (of dmc: its window)."
        )

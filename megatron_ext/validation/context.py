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

"""What cannot work when sequences are split over ranks (context parallelism). Neither torch nor Megatron is
loaded."""

from collections.abc import Iterator

from megatron_ext.config import RunConfig
from megatron_ext.validation.rules import at_least, multiple

_SIZE = "parallel.context_parallel_size"
_RING = "parallel.context_parallel_communication is ring"


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
    if run.parallel.sends_keys_round and not run.compression.problems(run.model.num_layers):
        yield from _ring_problems(run)


def _ring_problems(run: RunConfig) -> Iterator[str]:
    """For a map that is right in itself."""
    family, traits = run.compression.family(run.model.num_layers), run.compression.policy.traits
    layers = family.only
    if layers is None:
        yield (
            f"{_RING} and compression.layer_types is a family of maps, {family}, in which layers read the "
            "keys and values of others; a layer that others read gathers once for all of them: use gather."
        )
        return
    reader = next((layer for layer in layers if layer.source != layer.index), None)
    if reader is not None:
        yield (
            f"{_RING} and in compression.layer_types layer {reader.index} reads the keys and values of layer "
            f"{reader.source}; a layer that others read gathers once for all of them: use gather."
        )
        return
    windowed = next(
        (layer.index for layer in layers if run.compression.sight(layer).window is not None), None
    )
    if windowed is not None:
        yield (
            f"{_RING} and layer {windowed} has a sliding window (compression.sliding_window is "
            f"{run.compression.sliding_window}); windows end inside of the parts that go round, and the "
            "kernels that parts are joined of have no windows: use gather."
        )
    bias, exclude_self = traits.key_bias, run.compression.force_nodiag
    if bias is not None and bias.first_biased(exclude_self=exclude_self) > 1:
        yield (
            f"{_RING}, compression.policy.name is {run.compression.policy.name} and "
            f"compression.force_nodiag is {str(exclude_self).lower()}; a query then sees keys of other parts "
            "without the bias that these carry: use gather."
        )
    if run.model.attention_backend == "reference":
        yield (
            f"{_RING} and model.attention_backend is reference, which attends to whole sequences only: use "
            "gather, or set the latter to auto or sdpa."
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

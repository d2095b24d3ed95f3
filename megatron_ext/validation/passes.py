"""What cannot work in how cyclic groups are iterated. Torch is not loaded."""

from collections.abc import Iterator

from lckv.config import CompressionConfig
from lckv.sharing.plan import layer_groups
from megatron_ext.config import RunConfig, TrainConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.placement import place
from megatron_ext.validation.rules import at_least

_COMPARING = ("first_guess", "agreement_loss_coefficient")


def pass_problems(run: RunConfig) -> Iterator[str]:
    """Everything in the passes of `run` that cannot work, one sentence each."""
    if run.compression.problems(run.model.num_layers):
        return  # said elsewhere
    yield from _schedule(run.compression, run.train, run.model.num_layers)
    for name in _COMPARING:
        if value := getattr(run.compression, name):
            yield from _comparing(f"compression.{name}", value, run)
    groups, ranks = run.model.query_groups, run.parallel.tensor_model_parallel_size
    if run.compression.first_guess and 0 < groups < ranks:
        yield (
            f"compression.first_guess is true, model.num_query_groups is {groups} and "
            f"parallel.tensor_model_parallel_size is {ranks}; every rank guesses whole key/value heads of "
            "its own: choose a tensor parallel size of at most the number of these heads, or set the first "
            "to false."
        )


def _schedule(compression: CompressionConfig, train: TrainConfig, num_layers: int) -> Iterator[str]:
    schedule, least, most = (
        train.forward_passes_schedule, train.least_forward_passes, compression.forward_passes
    )  # fmt: skip
    yield from at_least("train", train, 0, "least_forward_passes")
    if schedule == "constant":
        if least != TrainConfig.least_forward_passes:
            yield (
                f"train.least_forward_passes is {least} and train.forward_passes_schedule is constant; every "
                "step then runs compression.forward_passes: leave the former out, or choose another schedule."
            )
        return
    named = f"train.forward_passes_schedule is {schedule}"
    if not compression.family(num_layers).any_cyclic:
        yield (
            f"{named} and compression.layer_types is {compression.family(num_layers)}, of which no layer "
            "reads a layer above itself, so that nothing is iterated: set the former to constant."
        )
    if least > most:
        yield (
            f"{named}, train.least_forward_passes is {least} and compression.forward_passes is {most}; the "
            "second must be at most the third, which is the most passes."
        )
    agreement = compression.agreement_loss_coefficient
    if agreement and 0 <= least <= most and least + compression.backward_passes < 2:
        yield (
            f"{named}, train.least_forward_passes is {least} and compression.agreement_loss_coefficient is "
            f"{agreement}; steps with a single pass have none before it to agree with: raise "
            "train.least_forward_passes, or set the last to 0."
        )


def _comparing(name: str, value: object, run: RunConfig) -> Iterator[str]:
    """What cannot be where passes are compared with each other."""
    value = "true" if value is True else value
    if run.train.activation_offload != "none":
        yield (
            f"{name} is {value} and train.activation_offload is {run.train.activation_offload}, which keeps "
            "no keys and values of other passes to compare: set one of them to its default."
        )
    if run.parallel.pipeline_model_parallel_size < 2:
        return
    try:
        placement = place(run.model, run.compression, run.parallel, vocab_size=1, seq_length=1)
    except (ConfigError, ZeroDivisionError):  # said elsewhere
        return
    starts = {layer: number for number, layers in enumerate(placement.chunks) for layer in layers}
    for group in layer_groups(run.compression.map(run.model.num_layers)):
        if group.iterated and starts.get(group.start) != starts.get(group.stop - 1):
            yield (
                f"{name} is {value} and layers {group.start} to {group.stop - 1}, which are iterated "
                "together, lie on several pipeline stages (parallel.pipeline_model_parallel_size is "
                f"{run.parallel.pipeline_model_parallel_size}); their passes are compared on one: give them "
                "one stage with parallel.pipeline_model_parallel_layout, lower the number of stages, or "
                "leave the former out."
            )

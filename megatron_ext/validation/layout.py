"""What cannot work in the sizes of a model and in how they are spread over processes and time. Usual settings
are checked without torch."""

import math
from collections.abc import Iterator
from dataclasses import fields

from lckv.config import CompressionConfig
from lckv.rope_scaling import scaling_problems
from megatron_ext.config import USUAL_FACTOR, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.placement import Placement, place
from megatron_ext.precision import Precision, precision
from megatron_ext.validation.context import context_problems
from megatron_ext.validation.passes import pass_problems
from megatron_ext.validation.policy import policy_layout_problems, policy_problems, trainable_problems
from megatron_ext.validation.rules import above_zero, at_least, fraction, multiple

RECOMPUTE_MODULES = ("core_attn", "mlp")


def layout_problems(run: RunConfig) -> list[str]:
    """Everything in a model and in how it is split over ranks that cannot work, one sentence each. How many
    processes there are, and how a step of training is divided, is not looked at."""
    return [
        *architecture_problems(run.model, run.compression, precision(run.train.precision)),
        *tensor_parallel_problems(run.model, run.parallel, run.train),
        *policy_layout_problems(run.compression.policy, run.parallel),
        *trainable_problems(run.compression.policy, run.train),
        *pipeline_problems(run),
        *context_problems(run),
        *pass_problems(run),
    ]


def architecture_problems(
    model: ModelConfig, compression: CompressionConfig, numbers: Precision
) -> Iterator[str]:
    """What cannot work in a model, trained in the precision `numbers`, on any layout."""
    yield from model_problems(model)
    yield from rope_problems(model)
    yield from compression_problems(compression, model.num_layers)
    yield from policy_problems(model, compression.policy, numbers)


def compression_problems(compression: CompressionConfig, num_layers: int) -> Iterator[str]:
    """What is wrong with the section `compression` for a model of `num_layers` layers."""
    return (str(problem.under("compression")) for problem in compression.problems(num_layers))


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Sizes of the model that are no sizes, or do not divide each other."""
    yield from at_least(
        "model", model, 1, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
        "num_query_groups", "kv_channels", "vocab_size", "make_vocab_size_divisible_by",
        "max_position_embeddings",
    )  # fmt: skip
    yield from at_least("model", model, 0, "cross_entropy_chunk_size", "cross_entropy_z_loss")
    yield from above_zero("model", model, "rotary_base", "layernorm_epsilon", "init_method_std")
    yield from fraction("model", model, "attention_dropout", "hidden_dropout")
    heads = model.num_attention_heads
    if model.kv_channels is None:
        way_out = "change one of them, or set model.kv_channels"
        yield from multiple(
            "model.hidden_size", model.hidden_size, "model.num_attention_heads", heads, way_out
        )
    if model.num_query_groups is not None:
        way_out = "every key/value head serves equally many query heads"
        groups = model.num_query_groups
        yield from multiple("model.num_attention_heads", heads, "model.num_query_groups", groups, way_out)


def rope_problems(model: ModelConfig) -> Iterator[str]:
    """What rotary embeddings and their scaling cannot do."""
    heads = model.num_attention_heads
    if model.kv_channels or (heads > 0 and model.hidden_size % heads == 0):
        name = "model.kv_channels" if model.kv_channels else "model.hidden_size / model.num_attention_heads"
        if model.head_dim % 2:
            yield (
                f"{name} is {model.head_dim}; it must be even, because rotary embeddings turn pairs of "
                "channels."
            )
    scaling = model.rope_scaling
    for entry in fields(scaling):
        value = getattr(scaling, entry.name)
        if entry.name == "type" or value == entry.default or hasattr(scaling.scaling, entry.name):
            continue
        if (entry.name, value) != ("factor", USUAL_FACTOR):
            yield (
                f"model.rope_scaling.{entry.name} is {value}; the type {scaling.type} does not have it: "
                "leave it out, or set model.rope_scaling.type to one that has."
            )
    if heads > 0:
        problems = scaling_problems(scaling.scaling, model.head_dim, model.rotary_base)
        yield from (str(problem.under("model.rope_scaling")) for problem in problems)


def tensor_parallel_problems(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig
) -> Iterator[str]:
    """What cannot be split over tensor-parallel ranks."""
    size = parallel.tensor_model_parallel_size
    name = "parallel.tensor_model_parallel_size"
    yield from at_least("parallel", parallel, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
    if size < 1:
        return
    way_out = "choose a tensor parallel size that divides it"
    yield from multiple("model.num_attention_heads", model.num_attention_heads, name, size, way_out)
    groups = model.num_query_groups
    if groups is not None and groups > 0 and groups % size and size % groups:
        yield (
            f"model.num_query_groups is {groups} and {name} is {size}; one must be a multiple of the other: "
            "every rank holds whole key/value heads, or a copy of one."
        )
    yield from multiple("model.ffn_hidden_size", model.ffn_size, name, size, way_out)
    if parallel.sequence_parallel and size == 1:
        yield (
            f"parallel.sequence_parallel is true and {name} is 1; raise the latter, or set the former to "
            "false."
        )
    if parallel.sequence_parallel and parallel.context_parallel_size == 1:
        way_out = "with parallel.sequence_parallel every rank holds an equal part of the sequence"
        yield from multiple("train.seq_length", train.seq_length, name, size, way_out)


def pipeline_problems(run: RunConfig) -> Iterator[str]:
    """What cannot be split into pipeline stages."""
    parallel, layers = run.parallel, run.model.num_layers
    size, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    name = "parallel.pipeline_model_parallel_size"
    if size < 1 or any(model_problems(run.model)) or run.compression.problems(layers):
        return  # said elsewhere
    if virtual is not None and (virtual < 1 or size < 2):
        yield (
            f"parallel.virtual_pipeline_model_parallel_size is {virtual} and {name} is {size}; the former "
            "must be at least 1, the latter at least 2: leave the former out, or raise the latter."
        )
        return
    if parallel.pipeline_model_parallel_layout is not None and size < 2:
        yield (
            f"parallel.pipeline_model_parallel_layout is {parallel.pipeline_model_parallel_layout!r} and "
            f"{name} is 1; one stage has all layers: leave the former out, or raise the latter."
        )
        return
    yield from _chunk_problems(run, size * (virtual or 1))


def _chunk_problems(run: RunConfig, chunks: int) -> Iterator[str]:
    """How the layers do not divide into so many stretches, and settings that nothing would read."""
    parallel, layers = run.parallel, run.model.num_layers
    names = "parallel.pipeline_model_parallel_size"
    if parallel.virtual_pipeline_model_parallel_size:
        names += " x virtual_pipeline_model_parallel_size"
    if layers < chunks:
        yield (
            f"model.num_layers is {layers} and {names} is {chunks}; every stage needs a layer: lower the "
            "latter."
        )
        return
    if parallel.pipeline_model_parallel_layout is None and layers % chunks:
        yield (
            f"model.num_layers is {layers} and {names} is {chunks}; the former must be a multiple of the "
            "latter, since stages have equally many layers: change one of them, or set "
            "parallel.pipeline_model_parallel_layout to auto, or to the layers of each stage."
        )
        return
    try:
        # Sizes that are wrong themselves are said elsewhere; here only the cutting is tried.
        placement = place(run.model, run.compression, parallel, vocab_size=1, seq_length=1)
    except ConfigError as error:
        yield str(error)
        return
    if parallel.pipeline_in_flight is not None:
        yield from _in_flight_problems(run, placement)


def _in_flight_problems(run: RunConfig, placement: Placement) -> Iterator[str]:
    in_flight = run.parallel.pipeline_in_flight
    if in_flight is not None and in_flight < 1:
        yield f"parallel.pipeline_in_flight is {in_flight}; it must be at least 1, or left out."
    elif not placement.journey(run.compression.heaviest(run.model.num_layers)).circulates:
        yield (
            f"parallel.pipeline_in_flight is {in_flight}, but each micro-batch comes to a stage once, and "
            "Megatron's schedule decides: leave it out. It is for layers on several pipeline stages that are "
            "iterated together, and for interleaving."
        )


def process_problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """How `world_size` processes do not divide by the layout of a model."""
    replica = parallel.replica_size
    sizes = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    sizes += ["context_parallel_size"] * (parallel.context_parallel_size != 1)
    if _has_sizes(parallel) and world_size % replica:
        named = [f"parallel.{name} is {getattr(parallel, name)}" for name in sizes]
        yield (
            f"{world_size} processes were started, {', '.join(named[:-1])} and {named[-1]}; the number of "
            f"processes must be a multiple of their product {replica}: change one of these numbers "
            "(processes: torchrun --nproc-per-node and --nnodes)."
        )


def data_parallel_problems(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> Iterator[str]:
    """How processes and batch do not divide, and what overlapping communication needs."""
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather is true, parallel.use_distributed_optimizer is "
            f"{_word(parallel.use_distributed_optimizer)} and parallel.overlap_grad_reduce is "
            f"{_word(parallel.overlap_grad_reduce)}; the first needs the other two: set them to true."
        )
    yield from above_zero("parallel", parallel, "distributed_timeout_minutes", "start_timeout_minutes")
    yield from at_least("parallel", parallel, 0, "flight_recorder_entries")
    if not _has_sizes(parallel):
        return
    yield from process_problems(parallel, world_size)
    replicas = max(1, world_size // parallel.replica_size)
    samples, batch = train.micro_batch_size * replicas, train.global_batch_size
    if samples > 0 and batch > 0 and batch % samples:
        yield (
            f"train.global_batch_size is {batch}, train.micro_batch_size is {train.micro_batch_size} and the "
            f"data-parallel size is {replicas}; the first must be a multiple of the others' product "
            f"{samples}, for instance {samples * math.ceil(batch / samples)}."
        )


def _has_sizes(parallel: ParallelConfig) -> bool:
    """Whether the sizes of the layout are sizes."""
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return min(*sizes, parallel.context_parallel_size) >= 1


def _word(value: bool) -> str:
    return "true" if value else "false"


def recompute_problems(run: RunConfig) -> Iterator[str]:
    """Settings of recomputation that contradict each other, and the layers of a pipeline stage."""
    train = run.train
    granularity, layers = train.recompute_granularity, train.recompute_num_layers
    known = ", ".join(RECOMPUTE_MODULES)
    unknown = [name for name in train.recompute_modules if name not in RECOMPUTE_MODULES]
    if unknown:
        yield (
            f"train.recompute_modules has {', '.join(unknown)}; the modules that can be recomputed are "
            f"{known}."
        )
    if granularity == "selective" and not train.recompute_modules:
        yield (
            "train.recompute_granularity is selective and train.recompute_modules is empty; name some of "
            f"{known}, or set train.recompute_granularity to none."
        )
    if layers is not None and granularity != "full":
        yield (
            f"train.recompute_num_layers is {layers} and train.recompute_granularity is {granularity}; the "
            "former needs full: set train.recompute_granularity to full, or leave train.recompute_num_layers "
            "out."
        )
    if layers is None or granularity != "full" or any(layout_problems(run)):
        return
    placement = place(run.model, run.compression, run.parallel, vocab_size=1, seq_length=1)
    most = max(len(placement.layers_of(stage)) for stage in range(placement.stages))
    if layers > most:
        yield (
            f"train.recompute_num_layers is {layers}; a pipeline stage has at most {most} layers "
            f"(model.num_layers / parallel.pipeline_model_parallel_size): set it to at most {most}, or "
            "leave it out to recompute all."
        )

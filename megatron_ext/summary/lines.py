"""What is said of a run before it starts, in lines of text: by the run itself and by the program that plans
one. Neither torch nor Megatron is loaded."""

from collections.abc import Iterator, Mapping, Sequence

from lckv.rope_scaling import follows_length, in_words
from lckv.sharing.doubts import doubts
from lckv.sharing.picture import draw, list_steps
from megatron_ext.config import RunConfig
from megatron_ext.data.order import SourceUse
from megatron_ext.model.cost import policy_line
from megatron_ext.model.offload_share import OffloadShare
from megatron_ext.summary.sizes import RunSizes, forward_passes_of

_INDENT = " " * 22
_SHOWN_SOURCES = 10


def picture(sizes: RunSizes) -> str:
    """The sharing map, a line per layer, and what in it is doubtful; of a family its first map."""
    lines = [*_family_lines(sizes), draw(sizes.layer_types, window=sizes.run.compression.sliding_window)]
    return "\n".join([*lines, *(f"warning: {doubt}" for doubt in doubts(sizes.layer_types))])


def _family_lines(sizes: RunSizes) -> Iterator[str]:
    family = sizes.family
    if family.only is not None:
        return
    if family.is_enumerated:
        number = f"{len(family.weights):,} maps"
    else:
        number = f"{family.number_of_draws:,} draws; means over them are estimated from some of them"
    yield f"each step draws its map from {family} ({number})."
    yield f"The cache and prompts are told for the first map, {family.first}:"


def model_lines(sizes: RunSizes) -> Iterator[str]:
    """Parameters, and KV cache per token."""
    plain, mine = sizes.plain_kv_bytes, sizes.kv_bytes
    yield (
        f"parameters            {sizes.parameters:,}, keys and values computed in "
        f"{len(sizes.family.stored.kv_layers)} of {sizes.shape.num_layers} layers"
    )
    if sizes.run.train.trainable == "policy":
        own = f"{sizes.policy_parameters:,}"
        yield f"trained               the KV policy's own {own} of them, all others are frozen"
    yield (
        f"KV cache              {mine:,} bytes per token in 16 bits, {plain / mine:.2f}x less than a plain "
        f"model's {plain:,}"
    )
    yield from _rope_line(sizes.run)
    yield from policy_line(sizes.run.compression.policy, kv_bytes=mine, plain_bytes=plain)


def _rope_line(run: RunConfig) -> Iterator[str]:
    scaling, length = run.model.rope_scaling.scaling, run.train.seq_length
    if scaling is not None:
        made_for = f", for rows of {length:,} tokens" if follows_length(scaling) else ""
        words = in_words(scaling, run.model.max_position_embeddings or length)
        yield f"RoPE                  {words}{made_for}"


def cost_lines(sizes: RunSizes) -> Iterator[str]:
    """Operations of a training step, and the steps of the plan where layers are iterated."""
    compression, cost, passes = sizes.run.compression, sizes.cost, ""
    if sizes.family.any_cyclic:
        numbers, schedule = forward_passes_of(sizes.run), sizes.run.train.forward_passes_schedule
        without = f"{numbers[0]} to {numbers[-1]} ({schedule})" if len(numbers) > 1 else f"{numbers[0]}"
        guess = ", from a learned first guess" if compression.first_guess else ""
        passes = (
            f" ({without} passes without and {compression.backward_passes} with gradient over each cyclic "
            f"group{guess})"
        )
    mean = "" if sizes.family.only else ", the mean over the maps"
    teacher = "" if sizes.teacher is None else " without a teacher"
    yield f"predicted cost        {cost.ratio:.2f}x a plain model's step{teacher}{mean}{passes}"
    if sizes.family.only and sizes.layer_types.any_cyclic:
        steps = list_steps(compression.plan(sizes.shape.num_layers))
        yield from (f"{_INDENT if number else 'steps'.ljust(22)}{step}" for number, step in enumerate(steps))
    all_passes = ", with all passes" if passes else ""
    yield (
        f"predicted prompt      {sizes.prompt.ratio:.2f}x a plain model's of {sizes.shape.seq_length:,} "
        f"tokens{all_passes}"
    )
    with_teacher = "" if sizes.teacher is None else ", the teacher's included"
    yield (
        f"FLOPs per token       {cost.model_flops:.3e} by the method, {cost.hardware_flops:.3e} with "
        f"recomputation{with_teacher}"
    )


def layout_lines(sizes: RunSizes) -> Iterator[str]:
    """Processes, and the batch of a step."""
    parallel, train = sizes.run.parallel, sizes.run.train
    sequence = " + SP" if parallel.sequence_parallel else ""
    ring = " (ring)" if parallel.sends_keys_round else ""
    context = f", CP {parallel.context_parallel_size}{ring}" if parallel.context_parallel_size > 1 else ""
    yield (
        f"layout                {sizes.world_size} processes: TP "
        f"{parallel.tensor_model_parallel_size}{sequence}, PP {parallel.pipeline_model_parallel_size}"
        f"{context}, DP {sizes.data_parallel_size}"
    )
    yield (
        f"global batch          {train.global_batch_size:,} sequences = {sizes.data_parallel_size} replicas "
        f"x {sizes.micro_batches} micro-batches x {train.micro_batch_size}; "
        f"{train.global_batch_size * train.seq_length:,} tokens per step"
    )
    yield from _teacher_line(sizes)


def _teacher_line(sizes: RunSizes) -> Iterator[str]:
    path, teacher = sizes.run.train.distillation.teacher, sizes.teacher
    if path is None:
        return
    if teacher is None:
        yield f"teacher               {path}: nothing of it is counted, since it cannot be used as it is"
        return
    yield (
        f"teacher               {path}: {teacher.parameters:,} parameters in {teacher.precision}; its "
        f"forward, {teacher.flops:.3e} FLOPs per token, is counted"
    )


def host_lines(sizes: RunSizes, peak_tflops: float | None) -> Iterator[str]:
    """What activations take of the host's memory, where they go there; `peak_tflops`: of the GPU."""
    run = sizes.run
    if run.train.activation_offload == "none":
        return
    settings = OffloadShare.of(run, vocab_size=sizes.shape.vocab_size).settings(peak_tflops)
    chosen = " (auto)" if run.train.offload_fraction == "auto" else ""
    needed, limit = (f"{size / 2**30:,.2f}" for size in (settings.expected_bytes, settings.host_bytes))
    yield (
        f"host memory           {needed} of {limit} GiB for each rank: attention outputs, and other "
        f"activations of {settings.share:.0%} of the tokens{chosen}"
    )


def data_lines(uses: Mapping[str, Sequence[SourceUse]], seq_length: int) -> Iterator[str]:
    """What each split reads until the run ends (validation: each time), with the epochs of its datasets."""
    for split, sources in uses.items():
        name, samples = f"{split} data".ljust(22), sum(source.samples for source in sources)
        tokens = f"{samples * seq_length:,} tokens"
        if len(sources) == 1:
            yield f"{name}{tokens}, {_epochs(sources[0])}"
            continue
        yield f"{name}{tokens} of {len(sources)} datasets"
        for source in sources[:_SHOWN_SOURCES]:
            yield f"{_INDENT}{source.samples / max(1, samples):6.1%}, {_epochs(source)}"
        if rest := sources[_SHOWN_SOURCES:]:
            most = max(rest, key=lambda source: source.samples / source.per_epoch)
            yield f"{_INDENT}and {len(rest)} more, at most {_epochs(most)}"


def _epochs(source: SourceUse) -> str:
    if not source.per_epoch:
        return f"new ones without end ({source.prefix})"
    return f"{source.samples / source.per_epoch:.2f} epochs of {source.prefix}"

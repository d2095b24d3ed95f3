"""Says what a run would be before anything starts.

    lckv-megatron plan --config run.yaml --world-size 64 --section.key value ... [--compare [MAP ...]]

That is its problems, map, size, cost, cache, layout and memory. Takes the command line of pretrain_lckv.py.
Needs no GPU, no processes and no data. Exit status: 0, or 2 where settings cannot work.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lckv.cost import ModelShape
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import crossing_sources
from lckv_megatron.layouts import LAYOUTS, cache_bytes, compare
from lckv_megatron.tables import size, table
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.command_line import exit_with, parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.cost import model_shape
from megatron_ext.model.memory import kept_by_full_recompute, kept_bytes, state_bytes
from megatron_ext.model.parameters import (
    StageParameters,
    padded_vocab_size,
    stage_parameters,
    total_parameters,
)
from megatron_ext.precision import precision
from megatron_ext.summary.lines import cost_lines, layout_lines, model_lines, picture
from megatron_ext.summary.sizes import RunSizes, recomputed_layers
from megatron_ext.validation.run import problems, step_problems

ACTIVATIONS = """\
activations: layer inputs and shared keys and values that full recompute keeps, for all micro-batches in
flight (formula: megatron_ext/model/memory.py). Not counted: logits, what is kept without recompute, the layer
that is being computed."""


@dataclass(frozen=True)
class Plan:
    """A run whose sizes fit together, on so many pretended processes."""

    run: RunConfig
    world_size: int
    vocab_size: int
    """True vocabulary, in tokens."""
    utilisation: float
    """Share of logging.peak_tflops that the run is assumed to reach, recomputation counted as work."""

    @property
    def shape(self) -> ModelShape:
        """For lckv.cost."""
        padded = padded_vocab_size(self.vocab_size, self.run.model, self.run.parallel)
        return model_shape(self.run.model, vocab_size=padded, seq_length=self.run.train.seq_length)

    @property
    def layer_types(self) -> LayerTypes:
        """The sharing map."""
        return self.run.compression.map(self.run.model.num_layers)

    @property
    def context(self) -> int:
        """Tokens of a full context."""
        return self.run.model.max_position_embeddings or self.run.train.seq_length

    @property
    def sizes(self) -> RunSizes:
        """What the run itself says too."""
        parameters = total_parameters(self.stages, self.run.parallel)
        return RunSizes(self.run, self.shape, self.world_size, parameters)

    @property
    def stages(self) -> tuple[StageParameters, ...]:
        """Parameters of the pipeline stages."""
        return stage_parameters(
            self.run.model, self.layer_types, self.run.parallel, vocab_size=self.vocab_size
        )


def describe(plan: Plan) -> Iterator[str]:
    """The plan, a line each."""
    sizes = plan.sizes
    yield picture(sizes)
    yield ""
    yield from model_lines(sizes)
    yield _full_context(plan)
    yield from cost_lines(sizes)
    yield from _length(plan)
    yield from layout_lines(sizes)
    stages = plan.run.parallel.pipeline_model_parallel_size
    if stages > 1:
        idle = (stages - 1) / (sizes.micro_batches + stages - 1)
        yield f"pipeline idle time    {100 * idle:.1f} % of a step: (PP - 1) / (micro-batches + PP - 1)"
    yield ""
    yield from table(_per_rank(plan))
    yield ACTIVATIONS


def _full_context(plan: Plan) -> str:
    maps = (plan.layer_types, LayerTypes.plain(plan.run.model.num_layers))
    mine, plain = (
        cache_bytes(plan.shape, layer_types, window=plan.run.compression.sliding_window, tokens=plan.context)
        for layer_types in maps
    )
    return (
        f"  full context        {size(mine)} for {plan.context:,} tokens, {plain / mine:.2f}x less than "
        f"{size(plain)}"
    )


def _length(plan: Plan) -> Iterator[str]:
    train, peak, cost = plan.run.train, plan.run.logging.peak_tflops, plan.sizes.cost
    tokens = train.train_iters * train.global_batch_size * train.seq_length
    yield (
        f"length                {train.train_iters:,} steps, {tokens:,} tokens, "
        f"{cost.model_flops * tokens:.2e} FLOPs"
    )
    if peak is not None:
        seconds = cost.hardware_flops * tokens / (plan.world_size * peak * 1e12 * plan.utilisation)
        time = f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 3600:,.1f} hours"
        yield (
            f"time                  {time} if every device does {100 * plan.utilisation:g} % of {peak:g} "
            "TFLOP/s (assumed, not measured)"
        )


def _per_rank(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Rows of the table of stages: what lies in the memory of each of their ranks."""
    run, stages, sizes = plan.run, plan.stages, plan.sizes
    optimizer_ranks = sizes.data_parallel_size if run.parallel.use_distributed_optimizer else 1
    yield (
        "stage",
        "layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "sends per micro-batch",
    )
    for number, stage in enumerate(stages):
        state = state_bytes(stage.per_rank, precision(run.train.precision), optimizer_ranks=optimizer_ranks)
        activations = "not predicted"
        if recomputed_layers(run) == run.model.num_layers:
            kept = kept_by_full_recompute(run.compression, run.model.num_layers, stage.layers)
            in_flight = min(len(stages) - number, sizes.micro_batches)
            activations = size(in_flight * kept_bytes(kept, run.model, run.parallel, run.train))
        yield (
            str(number),
            f"{stage.layers.start}-{stage.layers.stop - 1}",
            f"{stage.per_rank:,}",
            *map(size, (state.weights, state.gradients, state.optimizer)),
            activations,
            _sent(plan, stage.layers.stop),
        )


def _sent(plan: Plan, boundary: int) -> str:
    """What each rank below layer `boundary` sends to the next stage."""
    model, parallel, train = plan.run.model, plan.run.parallel, plan.run.train
    if boundary == model.num_layers:
        return "-"
    from megatron_ext.parallel.pipeline_payload import PipelinePayload  # loads torch: only pipelines wait

    ranks, policy = parallel.tensor_model_parallel_size, plan.run.compression.policy.build()
    owners_below = any(layer < boundary for layer in plan.layer_types.kv_layers)
    payload = PipelinePayload(
        sources=crossing_sources(plan.run.compression.plan(model.num_layers), boundary),
        hidden_size=model.hidden_size,
        sequence_shards=ranks if parallel.sequence_parallel else 1,
        kv_heads=max(1, model.query_groups // ranks),
        head_dim=model.head_dim,
        extra_channels=policy.traits.extra_channels,
        sum_columns=len(policy.statistics) * (ranks if policy.per_rank else 1) * owners_below,
    )
    numbers = math.prod(payload.shape(train.seq_length, train.micro_batch_size))
    sent = size(numbers * precision(train.precision).bytes)
    crossing = ", ".join(map(str, payload.sources))
    return f"{sent}: hidden states" + (f", KV of {crossing}" if crossing else "")


def find_vocab_size(run: RunConfig) -> int:
    """From model.vocab_size, the tokenizer or the datasets; raises ConfigError where none of them says."""
    if run.model.vocab_size is not None:
        return run.model.vocab_size
    from megatron_ext.data.checks import (
        find_vocabulary,
    )  # loads tokenizers: only runs without model.vocab_size wait

    known = find_vocabulary(run.data)
    if known is None:
        raise ConfigError(
            "the vocabulary is unknown; set model.vocab_size, or data.tokenizer_type and "
            "data.tokenizer_model."
        )
    return known.size


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return float(text)


def _own_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        "plan",
        __doc__,
        usage="%(prog)s [--config FILE ...] [--world-size N] [--compare [MAP ...]] [--section.key VALUE ...]",
        epilog="All settings: pretrain_lckv.py --help.",
    )
    parser.add_argument(
        "--world-size", type=positive, help="processes to pretend (default: one replica, TP x PP)"
    )
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="MAP",
        help=(
            "show the model with other maps instead: strings as in compression.layer_types, or names "
            "(default: all) of "
        )
        + ", ".join(layout.name.split()[0] for layout in LAYOUTS),
    )
    parser.add_argument(
        "--utilisation",
        type=_share,
        default=0.4,
        help=(
            "share of logging.peak_tflops assumed for the time, recomputation counted as work (default: "
            "%(default)s)"
        ),
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options, rest = _own_parser().parse_known_args(argv)
    run = parse_run_config(rest)
    parallel = run.parallel
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = options.world_size or max(1, replica)
    sentences = problems(run, world_size)
    vocab_size = 0
    if not step_problems(run, world_size):
        try:
            vocab_size = find_vocab_size(run)
        except ConfigError as error:
            sentences += [problem for problem in str(error).splitlines() if problem not in sentences]
    if vocab_size:
        plan = Plan(run, world_size, vocab_size, options.utilisation)
        try:
            print(
                "\n".join(
                    describe(plan)
                    if options.compare is None
                    else compare(plan.shape, run.compression, plan.context, options.compare)
                )
            )
        except ValueError as error:
            exit_with(f"--compare: {error}")
    for number, problem in enumerate(sentences, 1):
        print(f"problem {number}: {problem}", file=sys.stderr)
    return 2 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())

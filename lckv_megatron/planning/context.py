"""What the ranks that split sequences send each other."""

from collections.abc import Iterator

from lckv.sharing.plan import LayerRun, Part
from lckv_megatron.planning.plan import Plan
from lckv_megatron.tables import gib
from megatron_ext.model.memory import key_value_numbers, recomputed_of_stage
from megatron_ext.precision import precision


def context_lines(plan: Plan) -> Iterator[str]:
    """How many bytes, where sequences are split."""
    parallel = plan.run.parallel
    if parallel.context_parallel_size > 1:
        most = max(sent_bytes(plan, stage) for stage in range(len(plan.stages)))
        yield (
            f"context parallelism   {parallel.context_parallel_communication}: each rank sends {gib(most)} "
            "per micro-batch, keys, values and their gradients"
        )


def sent_bytes(plan: Plan, stage: int) -> int:
    """By each rank of a pipeline stage for a micro-batch, without the few tokens at the ends of chunks that
    KV policies look at."""
    run, ranks = plan.run, plan.run.parallel.context_parallel_size
    part = key_value_numbers(run.model, run.compression, run.parallel, run.train)
    if not run.parallel.sends_keys_round:
        part //= ranks
    times = sum(
        _times(plan, layers, layer_run, with_gradient=step.requires_grad)
        for layers in plan.stages[stage].chunks
        for step in plan.compression.plan(run.model.num_layers)
        for layer_run in step.runs
        if layer_run.computes_kv and layer_run.index in layers
    )
    return times * (ranks - 1) * part * precision(run.train.precision).bytes


def _times(plan: Plan, layers: range, run: LayerRun, *, with_gradient: bool) -> int:
    """How often all parts reach all ranks, for a run of one of `layers`."""
    train, ring = plan.run.train, plan.run.parallel.sends_keys_round
    if not with_gradient:
        return 1
    whole = train.activation_offload == "none" and run.index in recomputed_of_stage(train, layers)
    attention = train.recompute_granularity == "selective" and "core_attn" in train.recompute_modules
    again = run.part is Part.WHOLE and (whole or (ring and attention))
    return 1 + again + (2 if ring else 1)  # in backward keys and values go round, and their gradients

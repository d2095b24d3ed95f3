"""What a run is about to do, said before it starts: the map, its predicted cost, the cache it leads to, the
kernels chosen."""

from collections.abc import Iterator

import torch

from lckv.cost import ModelShape, TrainingCost, kv_bytes_per_token, training_cost
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw
from megatron_ext.config import RunConfig
from megatron_ext.model.attention_backend import choose_backend
from megatron_ext.model.cost import policy_line
from megatron_ext.model.specs import choose_implementation
from megatron_ext.precision import precision


def recomputed_layers(run: RunConfig) -> int:
    """Layers, over all stages, whose forward runs again in backward."""
    if run.train.recompute_granularity != "full":
        return 0
    stages = run.parallel.pipeline_model_parallel_size
    return min(run.model.num_layers, stages * (run.train.recompute_num_layers or run.model.num_layers))


def cost_of(run: RunConfig, shape: ModelShape) -> TrainingCost:
    """Predicted FLOPs per token of a training step. Recomputation counts where whole layers are recomputed;
    that of selective recompute and of a loss in chunks is left out."""
    return training_cost(shape, run.compression, recomputed_layers=recomputed_layers(run))


def describe(
    run: RunConfig, shape: ModelShape, *, parameters: int, device: torch.device, world_size: int
) -> str:
    """The run's summary, a line each."""
    return "\n".join(_lines(run, shape, parameters, device, world_size))


def _lines(
    run: RunConfig, shape: ModelShape, parameters: int, device: torch.device, world_size: int
) -> Iterator[str]:
    compression, parallel, train = run.compression, run.parallel, run.train
    layer_types = compression.map(shape.num_layers)
    cost = cost_of(run, shape)
    yield draw(layer_types, window=compression.sliding_window)
    plain, mine = (
        kv_bytes_per_token(shape, kinds) for kinds in (LayerTypes.plain(shape.num_layers), layer_types)
    )
    yield (
        f"parameters            {parameters:,}, keys and values computed in {len(layer_types.kv_layers)} of "
        f"{shape.num_layers} layers"
    )
    yield (
        f"KV cache              {mine:,} bytes per token in 16 bits, {plain / mine:.2f}x less than a plain "
        "model"
    )
    yield from policy_line(compression.policy, kv_bytes=mine, plain_bytes=plain)
    for statistic in compression.policy.build().statistics:
        yield f"reported as           {statistic.name}/layer_I/head_J: {statistic.text}"
    passes = (
        f"{compression.forward_passes} passes without and {compression.backward_passes} with gradient over "
        "each cyclic group"
    )
    yield f"predicted cost        {cost.ratio:.2f}x a plain model's step" + (
        f" ({passes})" if layer_types.any_cyclic else ""
    )
    yield (
        f"FLOPs per token       {cost.model_flops:,.0f} by the method, {cost.hardware_flops:,.0f} with "
        "recomputation "
        "(formula: lckv/cost.py)"
    )
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = world_size // (tensor * pipeline)
    yield (
        f"layout                {world_size} processes: TP "
        f"{tensor}{' + SP' if parallel.sequence_parallel else ''}, PP {pipeline}, "
        f"DP {data}; {train.global_batch_size // (train.micro_batch_size * data)} micro-batches of "
        f"{train.micro_batch_size} x "
        f"{train.seq_length} tokens per step and rank"
    )
    dtype = precision(train.precision).dtype
    attention = choose_backend(
        run.model.attention_backend, device=device, dtype=dtype, head_dim=shape.head_dim
    )
    layers = choose_implementation(run.model.transformer_impl)
    yield f"attention             {attention.name} ({attention.reason})"
    yield f"layers                {layers.name} ({layers.reason})"

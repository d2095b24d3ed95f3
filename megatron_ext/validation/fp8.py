"""What cannot work in FP8: what it needs of the machine, of the plan of passes and of sizes."""

from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.validation.transformer_engine import needs_layers, needs_version


class _Needs(NamedTuple):
    """What a recipe needs."""

    version: str
    """Of Transformer Engine, at least."""

    capability: tuple[int, int]
    """Of the GPU, at least."""

    multiple: int
    """What the sizes of matrices must be multiples of."""


_NEEDS = {
    "tensorwise": _Needs("2.2", (8, 9), 16),
    "blockwise": _Needs("2.3", (9, 0), 16),
    "delayed": _Needs("2.0", (8, 9), 16),
    "mxfp8": _Needs("2.1", (10, 0), 32),
}


def fp8_problems(run: RunConfig) -> Iterator[str]:
    """Everything that FP8 cannot do in `run`, one sentence each."""
    model = run.model
    if model.fp8 is None:
        yield from _is_off(model)
        return
    yield from _passes(run)
    yield from _sizes(model, run.parallel, run.train)
    setting, needs = f"model.fp8 is {model.fp8}", _NEEDS[model.fp8_recipe]
    told = list(needs_layers(setting, run))
    yield from told
    if not told:
        yield from needs_version(f"model.fp8_recipe is {model.fp8_recipe}", needs.version)
        yield from _capability(model, needs)
    if run.parallel.tp_comm_overlap and model.fp8_passes == "no_gradient":
        yield from needs_version(
            "parallel.tp_comm_overlap is true and model.fp8_passes is no_gradient", "2.7"
        )


def _is_off(model: ModelConfig) -> Iterator[str]:
    for entry in fields(model):
        value = getattr(model, entry.name)
        if entry.name.startswith("fp8_") and value != entry.default:
            yield (
                f"model.{entry.name} is {value} and model.fp8 is not set; set the latter to e4m3 or hybrid, "
                "or leave the former out."
            )


def _passes(run: RunConfig) -> Iterator[str]:
    model, compression = run.model, run.compression
    if model.fp8_passes == "all" or compression.problems(model.num_layers):
        return
    if all(step.requires_grad for step in compression.heaviest(model.num_layers).plan(model.num_layers)):
        yield (
            "model.fp8_passes is no_gradient, compression.layer_types is "
            f"{compression.family(model.num_layers)} and compression.forward_passes is "
            f"{compression.forward_passes}; so no pass is without gradient: set model.fp8_passes to all, or "
            "choose a cyclic map and at least 1 such pass."
        )
    if model.fp8_recipe == "delayed":
        yield (
            "model.fp8_passes is no_gradient and model.fp8_recipe is delayed, whose scales are of passes "
            "with gradient: set the latter to tensorwise or blockwise."
        )


def _sizes(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> Iterator[str]:
    """Sides of the matrices of a rank."""
    ranks, multiple = parallel.tensor_model_parallel_size, _NEEDS[model.fp8_recipe].multiple
    heads, groups = model.num_attention_heads, model.query_groups
    head = "model.kv_channels" if model.kv_channels else "model.hidden_size / model.num_attention_heads"
    sizes = train.seq_length, train.micro_batch_size, parallel.context_parallel_size
    if min(ranks, heads, groups, model.hidden_size, *sizes) < 1:
        return  # said elsewhere
    over = f" / parallel.tensor_model_parallel_size {ranks}"
    queries = f"model.num_attention_heads {heads} * {head} {model.head_dim}"
    all_heads = f"(model.num_attention_heads {heads} + 2 * key/value heads {groups})"
    context = parallel.context_parallel_size
    split = f" / parallel.context_parallel_size {context}" if context > 1 else ""
    sides = {
        f"model.hidden_size {model.hidden_size}": model.hidden_size,
        f"{queries}{over}": heads * model.head_dim / ranks,
        f"{all_heads} * {head} {model.head_dim}{over}": ((heads + 2 * groups) * model.head_dim / ranks),
        f"model.ffn_hidden_size {model.ffn_size}{over}": model.ffn_size / ranks,
        f"train.seq_length {train.seq_length} * train.micro_batch_size {train.micro_batch_size}{split}": (
            parallel.tokens_of_rank(train.seq_length) * train.micro_batch_size
        ),
    }
    for name, side in sides.items():
        if side % multiple:
            yield (
                f"{name} is {side:g} and model.fp8_recipe is {model.fp8_recipe}; a matrix in FP8 with this "
                f"recipe has sides that are multiples of {multiple}: change one of these, or leave model.fp8 "
                "out."
            )


def _capability(model: ModelConfig, needs: _Needs) -> Iterator[str]:
    import torch  # there is a GPU: Transformer Engine's layers can be used

    capability = torch.cuda.get_device_capability()
    shown = f"{capability[0]}.{capability[1]}"
    recipe = f"model.fp8_recipe is {model.fp8_recipe}"
    if capability < needs.capability:
        least = f"{needs.capability[0]}.{needs.capability[1]}"
        yield (
            f"{recipe}, which needs a GPU of compute capability {least}, and this one has {shown}: "
            "choose another recipe, or leave model.fp8 out."
        )
    elif model.fp8_recipe == "mxfp8" and capability >= (12, 0):
        yield (
            f"{recipe}, which Transformer Engine does not have for GPUs of compute capability 12.0 and "
            f"above, and this one has {shown}: choose another recipe."
        )

"""Merged keys and values on the chunks of context-parallel ranks: the numbers recorded in golden/dmc."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from lckv.policies.base import RowPart, TokenContext
from lckv.policies.config import Reach
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy
from lckv.rope import Rotation, rotate
from megatron_ext.config import ParallelConfig
from megatron_ext.model.contexts import LayerContext, keys_values
from megatron_ext.parallel.chunks import chunk_rows
from megatron_ext.parallel.context import ContextGroup
from megatron_ext.parallel.process_groups import initialize
from tests.lckv.policies.dmc.test_golden import (
    GRADIENT,
    LOSS,
    OUTPUT,
    TRAINING,
    TRAINING_OUTPUT,
    attend,
    load,
)
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("case", TRAINING)
def test_merging_and_its_gradients(case: str) -> None:
    """A chunk has 8 tokens, the window 12."""
    for errors in run_on_ranks(2, errors_of, case):
        assert errors["value"] <= OUTPUT
        assert errors["out"] <= TRAINING_OUTPUT
        assert errors["rate"] <= LOSS
        assert max(errors[name] for name in "qkv") <= GRADIENT


def errors_of(case: str) -> dict[str, float]:
    """On every rank: largest differences from what is recorded."""
    tensors, header = load(case)
    initialize(ParallelConfig(context_parallel_size=2), seed=1)
    group = ContextGroup(parallel_state.get_context_parallel_group())
    policy = DMCPolicy(DMCConfig(stage="retrofit", temperature=header["temp"]))
    leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
    query, key, value = (group.chunks.own(leaf, 0) for leaf in leaves)
    context = context_of(tensors, group, policy.traits.reach)
    whole, (rate,) = keys_values(policy, key, value, query, context, group)
    queries, bounds = policy.query(query, context.tokens).chunk(2), group.chunks.bounds(len(whole.key))
    output = torch.cat(
        [
            attend(part, whole.key[:stop], whole.value[:stop])
            for part, (_, stop) in zip(queries, bounds, strict=True)
        ]
    )
    gradients = torch.autograd.grad((output * group.chunks.own(tensors["functional"], 0)).sum(), leaves)
    recorded = [tensors[f"grad_{name}__attn_only"] for name in "qkv"]
    # the recorded rate counts what token 0 would have decided, were it not the first
    decided = tensors["decisions"].index_fill(0, torch.tensor(0), 0.0)
    pairs = {
        "value": (whole.value, tensors["pooled_v"]),
        "out": (output, group.chunks.own(tensors["out"], 0)),
        "rate": (group.sum(rate), decided.float().mean(0)),
        **{
            name: (group.chunks.own(gradient, 0), group.chunks.own(expected, 0))
            for name, gradient, expected in zip("qkv", gradients, recorded, strict=True)
        },
    }
    return {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}


def context_of(tensors: dict[str, Tensor], group: ContextGroup, reach: Reach) -> LayerContext:
    """What is recorded of the tokens, as the policy of this rank gets it."""
    angles, noise = tensors["rope_angles"], tensors["gumbel1"] - tensors["gumbel2"]
    tokens = torch.arange(len(angles)).expand(noise.shape[1], -1)
    rows = chunk_rows(group.chunks, reach, tokens, tokens == 0, None)

    def at(positions: Tensor) -> Callable[[Tensor], Tensor]:
        turned = angles[positions][:, :, None]
        return partial(rotate, angles=Rotation(turned.cos(), turned.sin()))

    part = RowPart(reach, rows.begins, rows.counted_in_row, group.carried)
    chunks = TokenContext(at(rows.position_ids), training=True, part=part)
    own = TokenContext(at(group.chunks.own(tokens, 1).transpose(0, 1)), training=True)
    return LayerContext(own, chunks).with_noise(noise, group)

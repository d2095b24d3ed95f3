"""What cannot work where activations go to the host's memory. Torch is not loaded."""

import math
from collections.abc import Iterator
from dataclasses import fields

from megatron_ext.config import RunConfig, TrainConfig
from megatron_ext.model.offload_share import OffloadShare
from megatron_ext.offload.share import POOL_SHARE, host_bytes, share_that_fits
from megatron_ext.validation.layout import layout_problems
from megatron_ext.validation.rules import above_zero

_ON = "train.activation_offload is token_wise"


def offload_problems(run: RunConfig) -> Iterator[str]:
    """Everything that token-wise offloading cannot do in `run`, one sentence each."""
    train = run.train
    if train.activation_offload == "none":
        yield from _is_off(train)
        return
    sizes = [*_values(train)]
    yield from sizes
    yield from _others(run)
    if not sizes and train.seq_length > 0 and train.micro_batch_size > 0 and not layout_problems(run):
        yield from _host_memory(run)


def _is_off(train: TrainConfig) -> Iterator[str]:
    for entry in fields(train):
        value = getattr(train, entry.name)
        if entry.name.startswith("offload_") and value != entry.default:
            yield (
                f"train.{entry.name} is {value} and train.activation_offload is none; set the latter to "
                "token_wise, or leave the former out."
            )


def _values(train: TrainConfig) -> Iterator[str]:
    share = train.offload_fraction
    if share != "auto" and not 0 <= share <= 1:
        yield f"train.offload_fraction is {share}; it must be from 0 to 1, or auto."
    names = ("offload_host_gib", "offload_tflops", "offload_gigabytes_per_second")
    yield from above_zero("train", train, *names)


def _others(run: RunConfig) -> Iterator[str]:
    """Settings that do not go with it."""
    model, train = run.model, run.train
    if train.recompute_granularity != "none":
        yield (
            f"{_ON} and train.recompute_granularity is {train.recompute_granularity}; the former computes "
            "again what it does not keep: set the latter to none, or the former."
        )
    if model.hidden_dropout > 0 and train.offload_fraction != 1:
        yield (
            f"{_ON}, train.offload_fraction is {train.offload_fraction} and model.hidden_dropout is "
            f"{model.hidden_dropout}; tokens that are computed again would be dropped differently: set the "
            "second to 1, or the third to 0."
        )
    if model.fp8 is not None and model.fp8_passes == "all":
        yield (
            f"{_ON} and model.fp8 is {model.fp8} in all passes; its layers keep quantised tensors and scales "
            "of whole sequences: set the former to none, or model.fp8_passes to no_gradient."
        )
    if run.parallel.tp_comm_overlap:
        yield (
            f"{_ON} and parallel.tp_comm_overlap is true, whose buffers have the size of whole sequences: "
            "set one of them to none or false."
        )


def _host_memory(run: RunConfig) -> Iterator[str]:
    train = run.train
    share = OffloadShare.of(run, vocab_size=run.model.vocab_size or 1)
    asked = 0.0 if train.offload_fraction == "auto" else train.offload_fraction
    needed = host_bytes(share.loads, share.tokens, asked)
    if needed <= share.usable_bytes:
        return
    most = share_that_fits(share.loads, share.tokens, share.usable_bytes)
    way_out = f"set train.offload_fraction to at most {math.floor(100 * most) / 100:g}"
    if most < 0:
        way_out = (
            "attention outputs and layer inputs alone are more: lower train.micro_batch_size, raise "
            "parallel.tensor_model_parallel_size"
        )
    yield (
        f"train.offload_fraction is {train.offload_fraction} and train.offload_host_gib is "
        f"{train.offload_host_gib:g}, of which {POOL_SHARE:.0%} can be filled; with a share of {asked:g} the "
        f"activations of {share.tokens:,} tokens take {needed / 2**30:,.1f} GiB of the host's memory for "
        f"each rank: {way_out}, or raise train.offload_host_gib."
    )

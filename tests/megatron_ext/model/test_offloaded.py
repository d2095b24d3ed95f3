"""Activations on the host: gradients are those without it, bit for bit, and what is held is what was said."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.attention.visibility import Documents
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.offload_share import OffloadShare
from megatron_ext.model.offloaded import OffloadedLayers
from megatron_ext.offload.share import OffloadSettings
from tests.megatron_ext.model.stages import (
    ADAPTED_MAPS,
    EVERY_MAP,
    MODEL,
    draw_tokens,
    make_stage,
    positions_of,
)
from tests.megatron_ext.model.test_context_parallel import Case, batches_of, settings_of
from tests.ranks import run_on_ranks
from tests.thinning import thinned

SHARES = (0.0, 0.3, 1.0)
ROWS, LENGTH = 2, 20
EVERYTHING = {"add_qkv_bias": True, "qk_layernorm": True}
TOKEN_WISE = TrainConfig(precision="fp32", activation_offload="token_wise", offload_fraction=0.3)


def offload(stage: SharedKVGPTModel, share: float | None) -> None:
    """From now on; None: no more."""
    settings = None if share is None else OffloadSettings(share, 2**30)
    decoder = stage.decoder
    decoder.offloaded = OffloadedLayers(decoder.config, settings, torch.device("cpu")) if settings else None


def poison_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be right by chance because it lay in a buffer before."""
    from megatron_ext.offload.tape import Tape

    load = Tape.load

    def poisoned(tape: Tape, memory: Tensor, link: object) -> None:
        memory.fill_(0xFF)
        load(tape, memory, link)

    monkeypatch.setattr(Tape, "load", poisoned)


def gradients(stage: SharedKVGPTModel, documents: Documents | None = None) -> dict[str, Tensor]:
    tokens = draw_tokens(ROWS, LENGTH)
    losses, report = stage(tokens, positions_of(tokens), tokens, documents)
    auxiliary = 0 if report.auxiliary_loss is None else report.auxiliary_loss.sum()
    loss = losses.total + auxiliary
    loss.backward()
    result = {name: parameter.grad for name, parameter in stage.named_parameters()}
    stage.zero_grad(set_to_none=True)
    return result


def unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "cla",
        "mix",
        "lckv",
        "nodiag",
        "dmc",
        "groups x dmc",
        "mixed",
        "two sources",
        "lckv x adapter",
    ],
)
def test_gradients_are_those_without(name: str) -> None:
    assert run_on_ranks(1, differences, name, ParallelConfig()) == [[]]


@pytest.mark.parametrize(
    ("name", "sequence"),
    thinned(
        [("mixed lckv x dmc", True), ("lckv", True), ("dmc", True), ("adapter", True), ("cla", False)], 3
    ),
)
def test_gradients_with_tensor_and_sequence_parallelism(name: str, sequence: bool) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence)
    assert run_on_ranks(2, differences, name, parallel) == [[], []]


def differences(name: str, parallel: ParallelConfig) -> list[str]:
    """What is not the same with some share, with documents and without."""
    wrong = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison_buffers(monkeypatch)
        stage = make_stage({**EVERY_MAP, **ADAPTED_MAPS}[name], parallel, **EVERYTHING)
        for documents in (None, Documents(torch.tensor([0, 7, 20, 40], dtype=torch.int32))):
            offload(stage, None)
            expected = gradients(stage, documents)
            for share in SHARES:
                offload(stage, share)
                for _ in range(2):  # the second time buffers and pool are there
                    wrong += [
                        f"{share} {parameter}" for parameter in unequal(gradients(stage, documents), expected)
                    ]
                assert stage.decoder.offloaded.storage.pool.used == 0, (
                    "a cycle of references keeps activations"
                )
    return wrong


@pytest.mark.parametrize("name", ["lckv", "yoco"])
def test_gradients_on_a_pipeline(name: str) -> None:
    for wrong in run_on_ranks(2, pipeline_differences, name):
        assert wrong == []


def pipeline_differences(name: str) -> list[str]:
    from megatron_ext.data.batch import Batch
    from megatron_ext.model.build import wrap
    from megatron_ext.schedule.micro_batches import run_schedule
    from megatron_ext.schedule.statistics_meter import StatisticsMeter

    train = TrainConfig(
        precision="fp32",
        micro_batch_size=1,
        global_batch_size=4,
        seq_length=LENGTH,
        activation_offload="none",
    )
    stage = make_stage(EVERY_MAP[name], ParallelConfig(pipeline_model_parallel_size=2), train)
    model = wrap(stage, ParallelConfig(pipeline_model_parallel_size=2), train)
    assert stage.decoder.journey.circulates == (name == "lckv")
    found = []
    for share in (None, *SHARES):
        offload(stage, share)
        model.zero_grad_buffer()
        rows = [draw_tokens(1, LENGTH, seed) for seed in range(4)]
        batches = iter([Batch(row, row, torch.ones(row.shape), positions_of(row), None) for row in rows])
        run_schedule(
            model,
            batches,
            lambda batch: batch,
            train,
            StatisticsMeter(model),
            progress=0.0,
            forward_only=False,
        )
        found.append({name: parameter.main_grad.clone() for name, parameter in stage.named_parameters()})
        assert share is None or stage.decoder.offloaded.storage.pool.allocated > 0
    return [wrong for other in found[1:] for wrong in unequal(found[0], other)]


@pytest.mark.parametrize(
    "case",
    thinned(
        [
            Case("lckv x dmc", "documents", cp=2),
            Case("lckv", cp=2),
            Case("dmc", cp=2, communication="ring"),
            Case("dmc", cp=2, tp=2, sequence_parallel=True),
            Case("plain", "documents", cp=2, communication="ring"),
            Case("plain", "documents", cp=2),
        ],
        2,
    ),
    ids=str,
)
def test_gradients_with_context_parallelism(case: Case) -> None:
    for wrong in run_on_ranks(case.cp * case.tp, context_differences, case):
        assert wrong == []


def context_differences(case: Case) -> list[str]:
    from megatron_ext.model.build import wrap
    from megatron_ext.schedule.micro_batches import run_schedule
    from megatron_ext.schedule.statistics_meter import StatisticsMeter

    parallel, train = settings_of(case)
    stage = make_stage(EVERY_MAP[case.name], parallel, train)
    model = wrap(stage, parallel, train)
    results = []
    for share in (None, *SHARES):
        offload(stage, share)
        model.zero_grad_buffer()
        batches, meter = iter(batches_of(case)), StatisticsMeter(model)
        run_schedule(model, batches, lambda batch: batch, train, meter, progress=0.5, forward_only=False)
        results.append({name: parameter.main_grad.clone() for name, parameter in stage.named_parameters()})
        assert share is None or stage.decoder.offloaded.storage.pool.allocated > 0
    return [wrong for other in results[1:] for wrong in unequal(results[0], other)]


def test_passes_without_gradient_and_evaluation_put_nothing_on_the_host() -> None:
    run_on_ranks(1, check_without_gradient)


def check_without_gradient() -> None:
    stage = make_stage(EVERY_MAP["lckv"])
    offload(stage, 1.0)
    tokens = draw_tokens(1, 8)
    with torch.no_grad():
        stage(tokens, positions_of(tokens), tokens)
    assert stage.decoder.offloaded.storage.pool.allocated == 0


@pytest.mark.parametrize("name", ["plain", "cla"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_held(name: str, share: float) -> None:
    ((host, device, predicted, shared),) = run_on_ranks(1, held_bytes, name, share)
    assert device <= shared + 4096, "only keys and values that several layers read stay on the device"
    # Of the MLP the prediction counts whole storages, of which the host gets only what is read.
    assert host == pytest.approx(predicted, rel=0.12 if share else 1e-9)


def held_bytes(name: str, share: float) -> tuple[int, int, int, int]:
    """Bytes of a forward over all layers that wait for backward: on the host, on the device, predicted on
    the host, and predicted on the device."""
    length = 128
    stage = make_stage(EVERY_MAP[name])
    offload(stage, share)
    decoder, hidden = stage.decoder, torch.randn(length, 1, MODEL.hidden_size, requires_grad=True)
    context = context_of(stage, length)
    contexts = dict.fromkeys(decoder.places, context)
    before = alive_bytes()
    decoder.offloaded.begin()
    states, available = hidden, {}
    for layer in decoder.layers:
        kind = layer.self_attention.layer_type
        output = decoder.call(layer, states, available.get(kind.source), contexts[kind.index])
        states = output.hidden_states
        if output.own is not None and kind.index in decoder.offloaded._read_by_others:
            available[kind.index] = output.own
    del output
    pool = decoder.offloaded.storage.pool
    kept = alive_bytes() - before - pool.allocated - states.untyped_storage().nbytes()
    train = replace(
        TOKEN_WISE, offload_fraction=share, seq_length=length, micro_batch_size=1, global_batch_size=1
    )
    loads = OffloadShare(MODEL, EVERY_MAP[name], ParallelConfig(), train, decoder.config.placed, fused=False)
    owners = len(decoder.offloaded._read_by_others)
    width = 2 * MODEL.query_groups * MODEL.head_dim * 4
    return pool.used, kept, loads.settings(None).expected_bytes, owners * length * width


def alive_bytes() -> int:
    """Of the storages of all tensors that Python knows, which with hooks are all but those of the graph."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def context_of(stage: SharedKVGPTModel, length: int) -> Any:
    from lckv.policies.base import TokenContext
    from lckv.rope import Turn
    from megatron_ext.model.contexts import LayerContext

    positions = torch.arange(length)[:, None, None]
    return LayerContext(TokenContext(Turn(stage.angles(positions, length)), training=True))


def test_settings_reach_the_layers() -> None:
    run_on_ranks(1, check_settings)


def check_settings() -> None:
    stage = make_stage(EVERY_MAP["plain"], train=TOKEN_WISE)
    assert stage.decoder.offloaded._settings.share == 0.3
    assert stage.config.offload.host_bytes == 128 * 2**30
    assert not stage.config.gradient_accumulation_fusion
    wrong = unequal(gradients(make_again(stage, "none")), gradients(make_again(stage, "token_wise")))
    assert wrong == []


def make_again(_: SharedKVGPTModel, activation_offload: str) -> SharedKVGPTModel:
    from megatron_ext.parallel.process_groups import parallel_state

    parallel_state.destroy_model_parallel()
    return make_stage(EVERY_MAP["plain"], train=replace(TOKEN_WISE, activation_offload=activation_offload))

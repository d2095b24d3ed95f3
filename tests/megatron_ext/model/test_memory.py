"""Memory of a step: with full recompute it grows with the number of layers as layer inputs only, and shared
keys and values are stored once. Bytes kept for backward are counted on the running model; what memory.py
predicts must be that to the byte."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dms.config import DMSConfig
from lckv_megatron.measuring.timing import peak_bytes
from megatron_ext.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.model.memory import (
    kept_bytes,
    kept_for_backward,
    loss_bytes,
    recomputed_of_stage,
    state_bytes,
)
from megatron_ext.model.parameters import padded_vocab_size, stage_parameters
from megatron_ext.model.placement import place
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.precision import precision as numbers
from megatron_ext.training.optimizer import build_optimizer
from tests.ranks import run_on_ranks
from tests.thinning import thinned
from tools.benchmarks.activation_memory import Step

TOKENS, BATCH = 24, 2
SIZES = ModelConfig(
    hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, vocab_size=40
)
LAYER_INPUT = TOKENS * BATCH * 32 * 4
KEY_VALUE = 2 * TOKENS * BATCH * 2 * 8 * 4
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def model(layers: int) -> ModelConfig:
    return ModelConfig(**{**vars(SIZES), "num_layers": layers})


def settings(layer_types: str) -> CompressionConfig:
    """ "0_2_2_3 guess" has a first guess, "0_2_2_3 agreement" that loss."""
    layer_types, _, more = layer_types.partition(" ")
    return CompressionConfig(
        layer_types=layer_types,
        forward_passes=2,
        sliding_window=6 if "s" in layer_types else None,
        first_guess=more == "guess",
        agreement_loss_coefficient=0.5 * (more == "agreement"),
    )


def training(precision: str = "fp32", recompute: str = "full") -> TrainConfig:
    return TrainConfig(
        micro_batch_size=BATCH, seq_length=TOKENS, precision=precision, recompute_granularity=recompute
    )


def measured(maps: list[str], parallel: ParallelConfig, precision: str) -> list[tuple[int, int]]:
    """Run on every rank: (bytes saved for backward, peak) of a step with full recompute, for each map."""
    initialize(parallel, seed=1)
    found = []
    for layer_types in maps:
        layers = layer_types.count("_") + 1
        step = Step.of(model(layers), settings(layer_types), training(precision), parallel)
        found.append((step.saved_bytes(), peak_bytes(step.run)))
    return found


def saved(*maps: str, parallel: ParallelConfig = ParallelConfig(), precision: str = "fp32") -> list[int]:  # noqa: B008
    ranks = run_on_ranks(parallel.tensor_model_parallel_size, measured, list(maps), parallel, precision)
    first, *others = [[bytes_saved for bytes_saved, _ in rank] for rank in ranks]
    assert all(other == first for other in others)
    return first


def one_source(layers: int) -> str:
    return "_".join(["0"] * layers)


def lckv(layers: int) -> str:
    return "_".join(["0", *[str(layers - 2)] * (layers - 2), str(layers - 1)])


@pytest.mark.parametrize(
    ("family", "inputs_per_layer"),
    [(one_source, 1), (lckv, 2)],
    ids=["one source", "lckv: 2 passes with gradient"],
)
def test_each_further_reader_costs_its_input_alone(family, inputs_per_layer) -> None:
    depths = (4, 5, 8, 12)
    (found,) = run_on_ranks(1, measured, [family(depth) for depth in depths], ParallelConfig(), "fp32")
    random_states = (
        2 * torch.get_rng_state().numel()
    )  # Megatron's recompute keeps those of the CPU and of the "GPU"
    for (kept, peak), depth in zip(found, depths, strict=True):
        more = inputs_per_layer * (depth - depths[0])
        assert kept == found[0][0] + more * LAYER_INPUT
        assert peak == pytest.approx(found[0][1] + more * (LAYER_INPUT + random_states), abs=1024)


def test_without_recompute_a_layer_keeps_many_times_its_input() -> None:
    (none,) = run_on_ranks(1, growth_without_recompute)
    assert none > 10 * LAYER_INPUT


def growth_without_recompute() -> int:
    initialize(ParallelConfig(), seed=1)
    few, many = (
        Step.of(model(layers), settings(one_source(layers)), training(recompute="none")).saved_bytes()
        for layers in (4, 5)
    )
    return many - few


def test_shared_keys_and_values_are_stored_once() -> None:
    own, one, two, three = saved("0_1_2_3_4_5", "0_0_0_0_0_0", "0_0_0_3_3_3", "0_0_2_2_4_4")
    assert (one - own, two - own, three - own) == (KEY_VALUE, 2 * KEY_VALUE, 3 * KEY_VALUE)


@pytest.mark.parametrize("precision", thinned(["fp32", "bf16"], 2))
@pytest.mark.parametrize("parallel", [ParallelConfig(), TP2], ids=["tp1", "tp2+sp"])
def test_prediction_is_exact(parallel: ParallelConfig, precision: str) -> None:
    """Up to what does not depend on the map: embedding, final norm and loss; and for a cyclic group the top
    of its first passes."""
    acyclic = ["0_1_2_3", "0_0_2_2_4_4", "0s_1s_2s_3_3_3", "0_0_1_1_0_3_2_7", "0_1_2+0_2_4+2_4"]
    cyclic = ["0_2_2_3", "0_4_4_4_4_5", "0_3_3_3_3_3_3_7", "0_2_4_2_4_5", "3_3_3_3_3_1_2"]
    cyclic += ["0_4_4_4_4_5 guess", "0_4_4_4_4_5 agreement"]
    for maps in (acyclic, cyclic):
        found = saved(*maps, parallel=parallel, precision=precision)
        rest = set()
        for layer_types, bytes_saved in zip(maps, found, strict=True):
            layers = layer_types.count("_") + 1
            kept = kept_for_backward(settings(layer_types), layers, range(layers))
            predicted = kept_bytes(kept, model(layers), settings(layer_types), parallel, training(precision))
            rest.add(bytes_saved - predicted)
        assert len(rest) == 1
        assert 0 < rest.pop() < 10 * LAYER_INPUT


def stage_saved(layer_types: str, parallel: ParallelConfig) -> int:
    """Run on every rank: bytes that this pipeline stage keeps for backward."""
    initialize(parallel, seed=1)
    layers = layer_types.count("_") + 1
    stage = build_stage(model(layers), settings(layer_types), parallel, training(), vocab_size=40)
    if not parallel_state.is_pipeline_first_stage():
        shape = stage.decoder.payload_in(stage.decoder.visit).shape(TOKENS, BATCH)
        stage.set_input_tensor(torch.randn(shape, requires_grad=True))
    tokens = torch.randint(40, (BATCH, TOKENS))
    positions = torch.arange(TOKENS).expand_as(tokens)

    def forward() -> torch.Tensor:
        output, _ = stage(tokens, positions, tokens)
        return output.total if stage.post_process else output.sum()

    return Step(forward, list(stage.parameters())).saved_bytes()


def test_prediction_for_stages_is_exact() -> None:
    """Growth from one map to the next; the ends of the model are the same in both."""
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    few, many = "0s_1_1_1", "0_1_1_0_1_1_1_1"
    before, after = (run_on_ranks(2, stage_saved, layer_types, parallel) for layer_types in (few, many))
    for stage in range(2):
        predicted = [
            kept_bytes(
                kept_for_backward(
                    settings(each), layers, range(stage * layers // 2, (stage + 1) * layers // 2)
                ),
                model(layers),
                settings(each),
                parallel,
                training(),
            )
            for each, layers in ((few, 4), (many, 8))
        ]
        assert after[stage] - before[stage] == predicted[1] - predicted[0]


@pytest.mark.parametrize(
    ("layer_types", "layers", "inputs", "shared", "runs"),
    [
        ("0_1_2_3", range(4), 4, 0, 0),
        ("0_0_2_2", range(4), 4, 2, 0),
        ("0_0_0_0", range(2, 4), 2, 1, 0),
        ("0_1_2_0", range(1, 3), 2, 1, 0),  # passes through
        ("0_1_1+0_1/0", range(2, 4), 2, 2, 0),
        # Layer 1 reads what the last two passes before it made; the first of them ends at keys and values.
        ("0_2_2_3", range(4), 2 + 2 * 2 - 1, 2, 1),
        ("0_2_2_2", range(4), 2 + 2 * 2 - 1, 3, 1),  # and layer 3 the last one's
    ],
)
def test_kept_tensors(layer_types: str, layers: range, inputs: int, shared: int, runs: int) -> None:
    kept = kept_for_backward(settings(layer_types), 4, layers)
    assert (kept.inputs, kept.shared, len(kept.runs)) == (inputs, shared, runs)


def test_a_mixture_of_two_layers_is_kept() -> None:
    """Beside these, for the backward of attention: what layer 2 keeps beyond layer 3, measured too."""
    one, other = "0_1_1+0_1", "0_1_1_1"
    none, parallel = training(recompute="none"), ParallelConfig()
    predicted = [
        kept_bytes(
            kept_for_backward(settings(each), 4, range(4), range(0)), model(4), settings(each), parallel, none
        )
        for each in (one, other)
    ]
    assert predicted[0] - predicted[1] == KEY_VALUE
    (found,) = run_on_ranks(1, saved_without_recompute, (one, other))
    assert KEY_VALUE <= found[0] - found[1] < KEY_VALUE + 200, "and weights of a few numbers"


def saved_without_recompute(maps: tuple[str, ...]) -> list[int]:
    initialize(ParallelConfig(), seed=1)
    none, parallel = training(recompute="none"), ParallelConfig()
    return [Step.of(model(4), settings(each), none, parallel).saved_bytes() for each in maps]


RECOMPUTE: list[dict[str, Any]] = [
    {},
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "full", "recompute_num_layers": 2},
]
DMC = DMCConfig(stage="retrofit")
DMS = DMSConfig(stage="retrofit", window=3)
ADAPTER = replace(DMS, decision_source="adapter")
MODELS = {
    "plain": (SIZES, CompressionConfig("0_1_2_3")),
    "cla": (SIZES, CompressionConfig("0_0_2_2")),
    "yoco": (SIZES, CompressionConfig("0s_1s_2_2", sliding_window=6)),
    "lckv": (SIZES, CompressionConfig("0_2_2_3", forward_passes=2)),
    "sandwich": (SIZES, CompressionConfig("0_1_1_3", forward_passes=2)),
    "no diagonal": (SIZES, CompressionConfig("0_1_2_3", force_nodiag=True)),
    "query and key norm": (replace(SIZES, qk_layernorm=True), CompressionConfig("0_0_2_3")),
    "dmc": (SIZES, CompressionConfig("0_1_2_3", policy=DMC)),
    "lckv with dmc": (SIZES, CompressionConfig("0_2_2_3", policy=DMC, forward_passes=2)),
    "dmc without window": (SIZES, CompressionConfig("0_1_2_3", policy=replace(DMC, window=None))),
    "dms": (SIZES, CompressionConfig("0_1_2_3", policy=DMS)),
    "cla with dms": (SIZES, CompressionConfig("0_0_2_2", policy=DMS)),
    "cla with an adapter": (SIZES, CompressionConfig("0_0_2_2", policy=ADAPTER)),
    "mixed": (SIZES, CompressionConfig("0_1+0_2+1_2")),
    "two sources": (SIZES, CompressionConfig("0_1_1/0_1+0")),
    "mixed lckv with dmc": (SIZES, CompressionConfig("0_2_2+0_3+2", policy=DMC, forward_passes=2)),
    "frozen cla": (SIZES, CompressionConfig("0_0_2_2", policy=ADAPTER)),
    "frozen lckv, mixed": (SIZES, CompressionConfig("0_2_2+0_3+2", policy=ADAPTER, forward_passes=2)),
    "frozen, query and key norm": (
        replace(SIZES, qk_layernorm=True),
        CompressionConfig("0_1_2_3", policy=ADAPTER),
    ),
    "loss in chunks": (replace(SIZES, cross_entropy_chunk_size=16), CompressionConfig("0_1_2_3")),
}


def measured_and_predicted(
    parallel: ParallelConfig, kinds: list[dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """Run on every rank: bytes kept for backward of each model with each kind of recompute."""
    initialize(parallel, seed=1)
    found = {}
    cases = [*product(("bf16",), kinds, MODELS.items()), *product(("fp32",), kinds[:1], MODELS.items())]
    for precision, recompute, (name, (sizes, compression)) in cases:
        trainable = "policy" if name.startswith("frozen") else "all"
        settings = {**RECOMPUTE_NONE, **recompute, "trainable": trainable}
        sized, train = model_of(sizes), replace(training(precision), **settings)
        step = Step.of(sized, compression, train, parallel)
        kept = kept_for_backward(compression, 4, range(4), recomputed_of_stage(train, range(4)))
        predicted = kept_bytes(kept, sized, compression, parallel, train)
        padded = padded_vocab_size(40, sized, parallel)
        predicted += loss_bytes(padded, sized, compression, parallel, train)[0]
        if (
            trainable == "all"
        ):  # without data parallelism no sums that the output weight's gradient is added to
            predicted += 4 * padded // parallel.tensor_model_parallel_size * sized.hidden_size
        found[f"{name}, {precision}, {recompute}"] = (step.saved_bytes(), predicted)
    return found


RECOMPUTE_NONE = {"recompute_granularity": "none"}


def model_of(sizes: ModelConfig) -> ModelConfig:
    return replace(sizes, num_layers=4, make_vocab_size_divisible_by=8)


@pytest.mark.parametrize(
    ("parallel", "kinds"),
    [
        pytest.param(ParallelConfig(), RECOMPUTE, id="tp1"),
        pytest.param(TP2, RECOMPUTE[-1:], id="tp2+sp"),
        pytest.param(TP2, RECOMPUTE[:-1], id="tp2+sp, more", marks=pytest.mark.nightly),
    ],
)
def test_what_is_kept_is_predicted_for_every_kind_of_recompute(
    parallel: ParallelConfig, kinds: list[dict[str, Any]]
) -> None:
    for rank in run_on_ranks(parallel.tensor_model_parallel_size, measured_and_predicted, parallel, kinds):
        assert len(rank) == (len(kinds) + 1) * len(MODELS)
        wrong = {name: pair for name, pair in rank.items() if abs(pair[1] / pair[0] - 1) > 0.1}
        assert wrong == {}


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_bytes_are_those_allocated(precision: str, distributed: bool) -> None:
    parallel = ParallelConfig(use_distributed_optimizer=distributed)
    placement = place(model(2), settings("0_0"), parallel, vocab_size=40, seq_length=TOKENS)
    (stage,) = stage_parameters(model(2), settings("0_0"), parallel, placement, vocab_size=40)
    ranks = run_on_ranks(2, allocated, parallel, precision)
    predicted = state_bytes(stage.per_rank, numbers(precision), optimizer_ranks=2 if distributed else 1)
    for weights, gradients, _ in ranks:
        assert weights == predicted.weights
        assert predicted.gradients <= gradients < 1.05 * predicted.gradients  # Megatron pads its buffers
    assert sum(optimizer for *_, optimizer in ranks) / 2 == pytest.approx(predicted.optimizer, rel=0.01)
    assert predicted.total == predicted.weights + predicted.gradients + predicted.optimizer


@pytest.mark.parametrize(
    ("settings_of_optimizer", "expected"),
    [
        ({}, 12),
        ({"use_precision_aware_optimizer": True}, 12),
        (
            {
                "use_precision_aware_optimizer": True,
                "main_params_dtype": "fp16",
                "exp_avg_dtype": "bf16",
                "exp_avg_sq_dtype": "fp8",
            },
            5,
        ),
        (
            {
                "use_precision_aware_optimizer": True,
                "optimizer_cpu_offload": True,
                "optimizer_offload_fraction": 0.75,
            },
            3,
        ),
    ],
)
def test_the_optimizers_dtypes_and_place_count(settings_of_optimizer: dict[str, Any], expected: int) -> None:
    optimizer = OptimizerConfig(**settings_of_optimizer)
    state = state_bytes(1000, numbers("bf16"), optimizer_ranks=2, optimizer=optimizer)
    assert (state.weights, state.gradients, state.optimizer) == (2000, 4000, 500 * expected)


def allocated(parallel: ParallelConfig, precision: str) -> tuple[int, int, int]:
    """Run on every rank: bytes of weights, of gradient buffers and of optimizer state after one step."""
    initialize(parallel, seed=1)
    train = training(precision)
    wrapped = wrap(build_stage(model(2), settings("0_0"), parallel, train, vocab_size=40), parallel, train)
    optimizer, _ = build_optimizer(OptimizerConfig(), parallel, train, wrapped)
    for buffer in wrapped.buffers:
        buffer.grad_data.fill_(1e-3)
    optimizer.step()
    held = {parameter.untyped_storage().data_ptr() for parameter in wrapped.parameters()}
    state: dict[int, int] = {}
    for inner in optimizer.chained_optimizers:
        groups = [parameter for group in inner.optimizer.param_groups for parameter in group["params"]]
        moments = [
            entry
            for each in inner.optimizer.state.values()
            for entry in each.values()
            if torch.is_tensor(entry)
        ]
        for tensor in (*groups, *moments):
            if tensor.untyped_storage().data_ptr() not in held and tensor.numel() > 1:
                state[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return (
        sum(parameter.numel() * parameter.element_size() for parameter in wrapped.parameters()),
        sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in wrapped.buffers),
        sum(state.values()),
    )

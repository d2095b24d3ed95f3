"""The cost model: against operations counted while the Megatron model really runs, and against tensors'
bytes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lckv.config import CompressionConfig
from lckv.cost import (
    ModelShape,
    average_keys,
    kv_bytes_per_token,
    layer_costs,
    prompt_cost,
    reading_cost,
    training_cost,
)
from lckv.models.cache import LCKVCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.sharing.early_exit import Results
from lckv.sharing.layer_types import LayerTypes
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks

MODEL = ModelConfig(
    num_layers=6,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=96,
    make_vocab_size_divisible_by=1,
)
SHAPE = ModelShape(6, 32, 96, 4, 2, 8, vocab_size=40, seq_length=16)
MAPS = [
    "0_1_2_3_4_5",
    "0_0_2_2_4_4",
    "0_4_4_4_4_5",
    "0_3_3_3_3_3",
    "1_1_3_3_5_5",
    "0_2_4_2_4_5",
    "5_5_5_5_5_5",
]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layer_types", [*MAPS, "0_4_4_4_4_5 guess"])
def test_counted_operations(layer_types: str, recompute: str) -> None:
    layer_types, _, guess = layer_types.partition(" ")
    compression = CompressionConfig(
        layer_types=layer_types, forward_passes=3, backward_passes=2, first_guess=bool(guess)
    )
    (counted,) = run_on_ranks(1, counted_flops_per_token, compression, recompute)
    cost = training_cost(SHAPE, compression, recomputed_layers=6 if recompute == "full" else 0)
    # the counter does not know PyTorch's attention on CPU: leave attention out on both sides
    without = training_cost_without_attention(compression, 6 if recompute == "full" else 0)
    assert counted == pytest.approx(without, rel=1e-9)
    assert cost.hardware_flops > without


@pytest.mark.parametrize("layer_types", ["0_0_2_2_4_4", "0_4_4_4_4_5"])
def test_counted_operations_where_weights_are_not_trained(layer_types: str) -> None:
    compression = CompressionConfig(layer_types=layer_types, forward_passes=3, backward_passes=2)
    (counted,) = run_on_ranks(1, counted_flops_per_token, compression, "full", True)
    without = training_cost_without_attention(compression, 6, trains_weights=False)
    assert counted == pytest.approx(without, rel=1e-9)
    seeing, blind = (
        training_cost(SHAPE, one).model_flops - training_cost(SHAPE, one, trains_weights=False).model_flops
        for one in (compression, blinded(compression))
    )
    assert seeing == pytest.approx(blind)  # attention has no weights


def training_cost_without_attention(
    compression: CompressionConfig, recomputed_layers: int, *, trains_weights: bool = True
) -> float:
    """The FLOPs that the cost model gives where queries see no keys."""
    return training_cost(
        SHAPE, blinded(compression), recomputed_layers=recomputed_layers, trains_weights=trains_weights
    ).hardware_flops


def blinded(compression: CompressionConfig) -> CompressionConfig:
    """The same with a window of 1 that excludes the query's own position."""
    blind = "_".join(f"{layer.source}s" for layer in compression.map(6))
    settings = {**vars(compression), "layer_types": blind, "sliding_window": 1, "force_nodiag": True}
    return CompressionConfig(**settings)


@pytest.mark.parametrize("results", Results)
@pytest.mark.parametrize("layer_types", MAPS)
def test_counted_operations_of_prompts(layer_types: str, results: Results) -> None:
    """The counter does not know attention on CPU: it is left out on both sides."""
    compression = CompressionConfig(layer_types=layer_types, forward_passes=2, backward_passes=2)
    config = LCKVLlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        compression={"layer_types": layer_types, "forward_passes": 2, "backward_passes": 2},
    )
    model, tokens = LCKVLlamaForCausalLM(config).eval(), torch.ones(1, 16, dtype=torch.int64)
    places = {Results.ALL: None, Results.SOME: torch.tensor([[15]]), Results.NONE: torch.empty(1, 0).long()}
    cache = LCKVCache(config).slots
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        output = model.model.run(model.model.embed_tokens(tokens), cache, wanted=places[results])
        model.lm_head(output.last_hidden_state[:, -1:])
    assert counter.get_total_flops() == prompt_cost(SHAPE, blinded(compression), results=results).flops
    if results is Results.ALL:  # of the other 15 tokens the head ran for none
        others = 15 * 2 * SHAPE.hidden_size * SHAPE.vocab_size
        assert 16 * reading_cost(SHAPE, blinded(compression)) == counter.get_total_flops() + others
    seeing = prompt_cost(SHAPE, compression, results=results)
    assert seeing.flops > counter.get_total_flops()
    fewer = prompt_cost(SHAPE, compression, passes=2, results=results)
    assert (fewer.flops < seeing.flops) == compression.map(6).any_cyclic


def test_a_prompt_of_a_map_whose_upper_half_computes_no_keys_costs_about_half() -> None:
    shape = ModelShape(32, 2048, 5632, 16, 4, 128, vocab_size=32000, seq_length=2048)
    lower = "_".join(map(str, range(16)))
    assert prompt_cost(shape, CompressionConfig(layer_types=f"{lower}{'_15' * 16}")).ratio < 0.5
    assert prompt_cost(shape, CompressionConfig()).ratio == 1.0
    plain, whole = (
        prompt_cost(shape, CompressionConfig(), results=one).flops for one in (Results.SOME, Results.ALL)
    )
    assert 30.9 / 32 < plain / whole < 31.5 / 32
    # The newest token sees all keys, where the average one sees half of them.
    costs = layer_costs(SHAPE, CompressionConfig(layer_types="0s_1s_3_3_4_5", sliding_window=5))
    seen = [cost.newest_attention / (4 * 32) for cost in costs]
    assert seen == [5, 5, 15, 16, 16, 16]


def counted_flops_per_token(compression: CompressionConfig, recompute: str, frozen: bool = False) -> float:
    initialize(ParallelConfig(), seed=1)
    train = TrainConfig(precision="fp32", recompute_granularity=recompute)
    stage = build_stage(MODEL, compression, ParallelConfig(), train, vocab_size=40)
    stage.requires_grad_(not frozen)
    stage.input_is_frozen = frozen
    tokens = torch.randint(0, 40, (2, 16))
    with FlopCounterMode(display=False) as counter:
        losses, report = stage(tokens, torch.arange(16).expand(2, -1), tokens)
        auxiliary = 0.0 if report.auxiliary_loss is None else report.auxiliary_loss.mean()
        (losses.total + auxiliary).backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 40])
def test_average_keys_counts_the_visible_entries(window: int | None, exclude_self: bool) -> None:
    from lckv.attention.reference import visible
    from lckv.attention.visibility import Visibility

    seen = visible(12, 1, Visibility(exclude_self, window), torch.device("cpu"))
    assert average_keys(12, exclude_self=exclude_self, window=window) == pytest.approx(seen.sum().item() / 12)


def test_a_plain_map_costs_what_a_plain_model_costs() -> None:
    assert training_cost(SHAPE, CompressionConfig()).ratio == 1.0


def test_readers_have_no_key_value_operations() -> None:
    costs = layer_costs(SHAPE, CompressionConfig(layer_types="0_0_2_2_2_5"))
    assert [cost.keys_values > 0 for cost in costs] == [True, False, True, False, False, True]


def test_cache_bytes() -> None:
    key = torch.zeros(2, 8, dtype=torch.bfloat16)
    layer_types = LayerTypes.parse("0_4_4_4_4_5", 6)
    assert kv_bytes_per_token(SHAPE, layer_types) == 3 * 2 * key.numel() * key.element_size()

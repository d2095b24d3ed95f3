"""Parameters counted without building a model are those of the model that is built."""

import pytest
from megatron.core import parallel_state

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model import build
from megatron_ext.model.parameters import padded_vocab_size, stage_parameters, total_parameters
from megatron_ext.model.placement import place
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.training.loop import _count_parameters
from tests.ranks import run_on_ranks

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
}
VOCABULARY = 50
PLAIN, CLA, YOCO, LCKV, MIXED = "0_1_2_3", "0_0_2_2", "0s_1s_2_2", "0_2_2_3", "0_1+0_1+0_1/0"


def layout(tensor: int, stages: int) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages, sequence_parallel=tensor > 1
    )


def built(model: ModelConfig, layer_types: str, parallel: ParallelConfig) -> tuple[int, int, int]:
    """Run on every rank: its stage, the parameters that it holds, and those of the whole model."""
    initialize(parallel, seed=1)
    compression = CompressionConfig(layer_types=layer_types, sliding_window=4 if "s" in layer_types else None)
    train = TrainConfig(precision="fp32")
    stage = build.build_stage(model, compression, parallel, train, vocab_size=VOCABULARY)
    held = sum(parameter.numel() for parameter in stage.parameters())
    return parallel_state.get_pipeline_model_parallel_rank(), held, _count_parameters(stage.parameters())


def check(model: ModelConfig, layer_types: str, tensor: int, stages: int) -> None:
    parallel = layout(tensor, stages)
    compression = CompressionConfig(layer_types=layer_types)
    placement = place(model, compression, parallel, vocab_size=VOCABULARY, seq_length=8)
    counted = stage_parameters(model, compression, parallel, placement, vocab_size=VOCABULARY)
    for stage, held, whole in run_on_ranks(tensor * stages, built, model, layer_types, parallel):
        assert counted[stage].per_rank == held
        assert total_parameters(counted, parallel) == whole


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("layer_types", "tensor", "stages"),
    [(types, *each) for types in (PLAIN, CLA, YOCO) for each in LAYOUTS]
    + [(LCKV, *each) for each in LAYOUTS]
    + [(MIXED, *LAYOUTS[-1])],
)
def test_maps_in_layouts(layer_types: str, tensor: int, stages: int) -> None:
    check(ModelConfig(**SIZES), layer_types, tensor, stages)


@pytest.mark.parametrize(
    "change",
    [
        {"untie_embeddings_and_output_weights": False},
        {"add_qkv_bias": True},
        {"qk_layernorm": True},
        {"num_query_groups": 1},
        {"kv_channels": 12, "make_vocab_size_divisible_by": 1},
        {"ffn_hidden_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 2)])
def test_models(change: dict[str, object], tensor: int, stages: int) -> None:
    check(ModelConfig(**{**SIZES, **change}), CLA, tensor, stages)


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 128, 129, 32000])
def test_padding_of_the_vocabulary_is_the_model_s(size: int, tensor: int) -> None:
    model, parallel = ModelConfig(**SIZES), ParallelConfig(tensor_model_parallel_size=tensor)
    assert padded_vocab_size(size, model, parallel) == build.padded_vocab_size(size, model, parallel)

"""Which layers a stage has: Megatron's notation, and stages of equal cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.model.placement import Placement, place, read_layout


def placed(layer_types: str, stages: int, *, vocab_size: int = 64, **options: object) -> Placement:
    model = ModelConfig(num_layers=layer_types.count("_") + 1, hidden_size=64, num_attention_heads=4)
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, **options)
    compression = CompressionConfig(layer_types=layer_types, sliding_window=8 if "s" in layer_types else None)
    return place(model, compression, parallel, vocab_size=vocab_size, seq_length=32)


@pytest.mark.parametrize(
    ("layout", "stages", "layers"),
    [("Ettt|tttttL", 2, 8), ("Et*3|(tt|)*2,t*2L", 4, 9), ("E(t|)*3t L", 4, 4), ("Et|t*2|ttt|t*4L", 2, 10)],
)
def test_the_notation_means_what_megatron_takes_it_for(layout: str, stages: int, layers: int) -> None:
    plain = layout.replace(" ", "")
    theirs = PipelineParallelLayerLayout(plain, stages).layout  # [stage][stretch]: a list of parts
    stretches = [theirs[stage][stretch] for stretch in range(len(theirs[0])) for stage in range(stages)]
    expected = [sum(part.name == "decoder" for part in stretch) for stretch in stretches]
    assert read_layout(layout, len(stretches), layers) == expected


def test_stretches_go_around_the_stages() -> None:
    placement = placed("0_1_2_3_4_5_6_7", 2, virtual_pipeline_model_parallel_size=2)
    assert placement.layers_of(0) == (0, 1, 4, 5)
    assert placement.of_stage(1) == (range(2, 4), range(6, 8))
    assert not placement.is_even and placed("0_1", 2).is_even


def test_auto_balances_passes_and_the_output_layer() -> None:
    plain = placed("0_1_2_3_4_5_6_7", 2, pipeline_model_parallel_layout="auto")
    assert list(map(len, plain.chunks)) == [4, 4]
    # a vocabulary that costs as much as several layers
    wide = placed("0_1_2_3_4_5_6_7", 2, pipeline_model_parallel_layout="auto", vocab_size=2048)
    assert len(wide.chunks[0]) > 4
    # the group, layers 1 to 3, runs nine passes
    cyclic = placed("0_3_3_3_4_5_6_7", 2, pipeline_model_parallel_layout="auto")
    assert len(cyclic.chunks[0]) < 4


@given(st.integers(2, 12), st.integers(2, 4), st.integers(0, 4096), st.integers(1, 11))
def test_no_cut_is_cheaper_than_auto(layers: int, stages: int, vocab_size: int, top: int) -> None:
    if stages > layers:
        return
    top = min(top, layers - 1)
    layer_types = "_".join(str(max(index, top)) for index in range(layers))
    options = {"vocab_size": vocab_size, "pipeline_model_parallel_layout": "auto"}
    automatic = placed(layer_types, stages, **options)
    assert sum(map(len, automatic.chunks)) == layers and all(automatic.chunks)
    if stages == 2:
        every = [
            placed(layer_types, 2, vocab_size=vocab_size,
                   pipeline_model_parallel_layout=f"E{'t' * cut}|{'t' * (layers - cut)}L")
            for cut in range(1, layers)
        ]  # fmt: skip
        assert heaviest(automatic, layer_types) == min(heaviest(each, layer_types) for each in every)


def heaviest(placement: Placement, layer_types: str) -> float:
    """Operations of the stage that does most."""
    steps = CompressionConfig(layer_types=layer_types).plan(placement.chunks[-1].stop)
    sums = []
    for stage in range(placement.stages):
        mine = placement.layers_of(stage)
        layers = sum(
            placement.costs[run.index].of(run.part) * (3 if step.requires_grad else 1)
            for step in steps
            for run in step.runs
            if run.index in mine
        )
        sums.append(layers + 3 * placement.head * (stage == placement.stages - 1))
    return round(max(sums), 3)

"""What a model must have, and what its tensors must be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_conversion import tensors
from checkpoints_conversion.tensors import (
    ConversionError,
    MemorySource,
    TensorInfo,
    check_finite,
    check_tensors,
    expected_tensors,
    row_chunks,
)
from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.initialization import global_parameters
from megatron_ext.parallel import process_groups
from tests.ranks import run_on_ranks

CASES = [
    ({}, {}),
    ({"num_query_groups": 1, "untie_embeddings_and_output_weights": False}, {}),
    ({"add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 6}, {"layer_types": "0_3_3_3"}),
    ({"add_qkv_bias": True}, {"layer_types": "0s_0s_2_2", "sliding_window": 3}),
]


def _model(settings: dict) -> ModelConfig:
    sizes = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 32,
    }
    return ModelConfig(**(sizes | {"make_vocab_size_divisible_by": 1} | settings))


def _parameters() -> list[dict[str, TensorInfo]]:
    process_groups.initialize(ParallelConfig(), seed=1)
    train = TrainConfig(precision="fp32")
    found = []
    for settings, compression in CASES:
        stage = build_stage(
            _model(settings), CompressionConfig(**compression), ParallelConfig(), train, vocab_size=32
        )
        found.append({name: TensorInfo(tuple(p.shape), p.dtype) for name, p in global_parameters(stage)})
    return found


def test_expected_tensors_are_the_parameters_of_the_training_model() -> None:
    for (settings, compression), parameters in zip(CASES, run_on_ranks(1, _parameters)[0], strict=True):
        expected = expected_tensors(_model(settings), CompressionConfig(**compression), 32, torch.float32)
        assert expected == parameters


def test_all_differences_are_told_but_not_at_any_length() -> None:
    expected = expected_tensors(_model({}), CompressionConfig(), 32, torch.float32)
    check_tensors(expected, expected, "here")
    with pytest.raises(ConversionError) as caught:
        check_tensors({"stranger": TensorInfo((1,), torch.float32)}, expected, "there")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("there: the tensors are not those")
    assert lines[1].startswith("  27 missing: embedding.word_embeddings.weight, decoder.layers.0.")
    assert lines[1].endswith(" and 22 more")
    assert lines[2] == "  1 not part of the model: stranger"


@pytest.mark.parametrize("dtype", tensors.WEIGHT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_counted(
    dtype: torch.dtype, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 64)
    tensor = torch.zeros(20, 5, dtype=dtype)
    check_finite("good", tensor, "a.safetensors")
    tensor[19, 3] = tensor[7, 1] = bad
    with pytest.raises(
        ConversionError, match=r"a.safetensors: w contains 2 of 100 values that are NaN or infinite"
    ):
        check_finite("w", tensor, "a.safetensors")


@given(rows=st.integers(1, 40), width=st.integers(1, 9), chunk=st.integers(1, 300))
def test_row_chunks_cover_all_rows_once(rows: int, width: int, chunk: int) -> None:
    info = TensorInfo((rows, width), torch.bfloat16)
    slices = list(row_chunks(info, chunk))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    assert all((part.stop - part.start) * width * 2 <= max(chunk, width * 2) for part in slices)


def test_memory_source() -> None:
    source = MemorySource({"w": torch.arange(6.0).reshape(3, 2)})
    assert source.infos() == {"w": TensorInfo((3, 2), torch.float32)}
    assert source.infos()["w"].nbytes == 24
    assert torch.equal(source.read("w", slice(1, 3)), source.read("w")[1:])

"""The benchmark of conversions, on a small model."""

from pathlib import Path

import pytest

from tools.benchmarks import conversion_memory
from tools.benchmarks.conversion_memory import conversions, measure, model_of, write_source


def test_models_grow_while_their_largest_tensor_stays() -> None:
    small, large = (model_of(size, vocab_size=5000) for size in (10**7, 5 * 10**7))
    assert small.model.num_layers < large.model.num_layers
    for description in (small, large):
        assert max(info.nbytes for info in description.expected_tensors().values()) == 5000 * 1024


@pytest.mark.skipif(not conversion_memory._CLEAR.exists(), reason="peak memory is read from Linux' /proc")
def test_rows(tmp_path: Path) -> None:
    description = model_of(10**7, vocab_size=2000)
    write_source(description, tmp_path)
    rows = [measure(name, description, tmp_path) for name in conversions(description, tmp_path)]
    assert [row["conversion"] for row in rows] == [
        "hf-to-megatron",
        "hf-to-megatron, averaged map",
        "megatron-to-hf",
    ]
    for row in rows:
        assert 0 <= row["peak_bytes"] < row["allowed_bytes"]  # type: ignore[operator]
        assert row["ratio_to_copy"] > 1  # type: ignore[operator]
        assert row["model_bytes"] > row["largest_tensor_bytes"]  # type: ignore[operator]

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import statistics
from megatron_ext.data.indexed import token_chunks
from megatron_ext.data.statistics import unigram_entropy
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import write_dataset


def test_equally_frequent_tokens(tmp_path: Path) -> None:
    assert unigram_entropy(write_dataset(tmp_path / "d", [[1, 3], [900, 5]])) == pytest.approx(math.log(4))
    assert unigram_entropy(write_dataset(tmp_path / "d", [[7] * 50])) == 0


def test_it_is_minus_the_mean_log_frequency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).geometric(0.1, 5000)
    prefix = write_dataset(tmp_path / "d", [tokens.tolist()])
    frequency = np.bincount(tokens) / len(tokens)
    monkeypatch.setattr(statistics, "token_chunks", lambda prefix, info: token_chunks(prefix, info, 77))
    assert unigram_entropy(prefix) == pytest.approx(-np.log(frequency[tokens]).mean())


def test_datasets_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no token"):
        unigram_entropy(write_dataset(tmp_path / "d", []))
    with pytest.raises(ConfigError, match="not found"):
        unigram_entropy(str(tmp_path / "none"))

"""The model from Transformer Engine's own Python modules, over a stub of its compiled extension."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext.model.stages import EVERY_MAP
from tests.pinned_sources import TRANSFORMER_ENGINE, folder_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[3]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    """By case, what `transformer_engine_build.compare` returns."""
    command = [sys.executable, "-m", "tests.megatron_ext.model.transformer_engine_build"]
    done = subprocess.run(
        [*command, str(folder_of(TRANSFORMER_ENGINE))], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kind_of_map_and_of_rank_is_built(results: Results) -> None:
    assert results.keys() > EVERY_MAP.keys()
    assert {name for name in results if "rank" in name} == {
        f"{axis} 2, rank {rank}" for axis in ("TP", "PP") for rank in range(2)
    }
    for name, result in results.items():
        assert result["keys"] > 20, name
        assert result["modules"] == ["megatron.core.extensions.transformer_engine"]


def test_keys_shards_attributes_and_initial_weights_are_those_of_local_layers(results: Results) -> None:
    assert {name: result["differences"] for name, result in results.items() if result["differences"]} == {}


def test_layers_add_gradients_themselves_and_none_overwrites_them(results: Results) -> None:
    for name, result in results.items():
        assert result["fused"] == result["linears"] > 0, name
        assert result["told the first micro-batch"] == 0, name

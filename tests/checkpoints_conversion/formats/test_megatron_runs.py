"""Training runs before and after a conversion, and the memory that it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.formats.megatron import MegatronCheckpoint, write_checkpoint
from lckv.config import CompressionConfig
from lckv.weights.tensors import MemorySource, TensorInfo
from megatron_ext.checkpointing.errors import MismatchError
from megatron_ext.config import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_ext.model.initialization import global_parameters, shard
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.restoring.model import restore
from tests.checkpoints_conversion.formats.checkpoints import manifest_of, whole_weights
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks

TP2 = ParallelConfig(tensor_model_parallel_size=2)
MEBIBYTE = 2**20


def run_with(**sections: dict[str, Any]) -> RunConfig:
    run = tiny_run(**{"optimizer": {"lr_warmup_iters": 0}, **sections})
    return replace(run, train=replace(run.train, train_iters=2))


def _different(directory: Path, weights: dict[str, Tensor]) -> list[str]:
    initialize(ParallelConfig(), seed=1)
    stage = restore(directory, ParallelConfig()).stage
    return [
        name
        for name, parameter in global_parameters(stage)
        if not torch.equal(
            parameter[: len(weights[name])], shard(stage, name, weights[name])[: len(weights[name])]
        )
    ]


def test_a_run_with_an_optimizer(tmp_path):
    run = run_with(train={"precision": "bf16"}, checkpoint={"save": str(tmp_path)})
    assert run_on_ranks(2, train, replace(run, parallel=TP2)) == [2, 2]
    checkpoint = MegatronCheckpoint(tmp_path)
    assert checkpoint.iteration == 2
    assert checkpoint.description == ModelDescription(
        replace(run.model, max_position_embeddings=run.train.seq_length),
        run.compression,
        "llama",
        torch.bfloat16,
    )
    weights = {name: checkpoint.read(name) for name in checkpoint.infos()}
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert run_on_ranks(1, _different, tmp_path, weights) == [[]]


def _starting_from(model: Path, **compression: Any) -> RunConfig:
    run = run_with(
        model={"max_position_embeddings": 64}, checkpoint={"load": str(model)}, compression=compression
    )
    return replace(run, checkpoint=replace(run.checkpoint, finetune=True))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, converted."""
    directory = tmp_path_factory.mktemp("dense")
    model = replace(run_with().model, max_position_embeddings=64)
    description = ModelDescription(model, CompressionConfig(), "llama", torch.float32)
    source = MemorySource(whole_weights(description))
    write_checkpoint(directory, description, source, record_json=manifest_of(description).to_json())
    return directory


def test_a_run_starts_from_a_converted_model(dense):
    assert run_on_ranks(2, train, replace(_starting_from(dense), parallel=TP2)) == [2, 2]


def test_stage_zero_out_starts_from_a_converted_model(dense):
    policy = {"name": "dmc", "stage": "zero_out"}
    assert run_on_ranks(1, train, _starting_from(dense, policy=policy)) == [2]


def test_later_stages_do_not(dense):
    run = _starting_from(dense, policy={"name": "dmc", "stage": "retrofit"})
    with pytest.raises(ValueError, match="Run stage zero_out first"):
        run_on_ranks(1, train, run)


def test_a_converted_model_is_no_run_to_resume(dense):
    run = replace(_starting_from(dense), checkpoint=CheckpointConfig(load=str(dense)))
    with pytest.raises(MismatchError, match=r"holds weights only.*Set checkpoint.finetune"):
        run_on_ranks(1, train, run)


class _Made:
    """Weights that exist only while they are read."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self._infos = infos

    def infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        start, stop, _ = (rows or slice(None)).indices(self._infos[name].shape[0])
        return torch.full((stop - start, *self._infos[name].shape[1:]), 0.5)


def _peak(action: Any) -> float:
    """MiB by which the resident memory of this process grows while `action` runs."""
    parallel_state.destroy_model_parallel()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    action()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _peaks(directory: Path, description: ModelDescription) -> tuple[float, float, float]:
    """Of writing, of reading tensor by tensor, of reading a little of everything; MiB."""
    made, content = _Made(description.expected_tensors()), manifest_of(description).to_json()
    writing = _peak(lambda: write_checkpoint(directory, description, made, record_json=content))
    checkpoint = MegatronCheckpoint(directory, verify_hashes=False)
    reading = _peak(lambda: [checkpoint.read(name) is None for name in checkpoint.infos()])
    rows = _peak(lambda: [checkpoint.read(name, slice(0, 1)) for name in checkpoint.infos()])
    return writing, reading, rows


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc"
)
def test_memory_does_not_grow_with_the_model(tmp_path):
    model = ModelConfig(
        num_layers=2, hidden_size=1024, ffn_hidden_size=4096, vocab_size=16384, max_position_embeddings=64
    )
    description = ModelDescription(model, CompressionConfig(), "llama", torch.float32)
    sizes = [info.nbytes / MEBIBYTE for info in description.expected_tensors().values()]
    assert sum(sizes) > 4 * max(sizes) == 256
    writing, reading, rows = run_on_ranks(1, _peaks, tmp_path / "model", description)[0]
    # rows of some 32 MiB at a time; on a busy machine pages of those before are still resident
    assert writing < 32 + 24 < max(sizes)
    assert reading < 1.3 * max(sizes) + 32
    assert rows < 16

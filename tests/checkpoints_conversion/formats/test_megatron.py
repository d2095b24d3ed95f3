"""Checkpoints of this project, read from every layout and written for every layout."""

import errno
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats import distcp
from checkpoints_conversion.formats.megatron import MODEL_FILE_NAME, MegatronCheckpoint, write_checkpoint
from checkpoints_conversion.staging import staged
from lckv.errors import ModelError
from lckv.weights.tensors import MemorySource, TensorInfo, row_chunks
from megatron_ext.checkpointing.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.checkpointing.folders import list_checkpoints, read_pointer
from megatron_ext.checkpointing.manifest import hash_files, list_files, read_manifest, write_manifest
from megatron_ext.checkpointing.verification import large_files
from megatron_ext.command_line import config_from_dict
from megatron_ext.config import ParallelConfig
from megatron_ext.evaluation.logits import compute_logits
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.restoring.model import restore
from megatron_ext.text_yaml import load_text_yaml
from tests.checkpoints_conversion.formats.checkpoints import (
    CASES,
    EMBEDDING,
    VOCAB,
    describe,
    different_weights,
    manifest_of,
    save,
    stage_with,
    whole_weights,
)
from tests.megatron_ext.model.stages import EVERY_MAP, draw_tokens
from tests.ranks import run_on_ranks

ONE = ParallelConfig()
TP2, TP4 = (ParallelConfig(tensor_model_parallel_size=size) for size in (2, 4))
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
LAYOUTS = {"tp1": ONE, "tp2": TP2, "tp4": TP4, "tp2 x pp2": TP2_PP2}
LARGEST_LOGIT_DIFFERENCE = 2e-5
"""Sums over tensor-parallel ranks are rounded in another order; logits are about 1."""


def ranks_of(parallel: ParallelConfig) -> int:
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def write(directory: Path, description: ModelDescription, **options: Any) -> Path:
    source = MemorySource(whole_weights(description))
    content = manifest_of(description).to_json()
    return write_checkpoint(directory, description, source, **{"record_json": content, **options})


def assert_holds(checkpoint: MegatronCheckpoint, weights: Mapping[str, Tensor]) -> None:
    assert checkpoint.infos().keys() == weights.keys()
    for name, weight in weights.items():
        assert checkpoint.infos()[name] == TensorInfo(tuple(weight.shape), weight.dtype), name
        assert torch.equal(checkpoint.read(name), weight), name


# Reading


def _save(cases: list[str], parallel: ParallelConfig, directory: Path) -> None:
    for case in cases:
        save(stage_with(CASES[case], parallel), CASES[case], directory / case)
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A checkpoint of a case by a layout; all cases are saved when a layout is first asked for."""
    root = tmp_path_factory.mktemp("saved")

    def path_of(case: str, layout: str) -> Path:
        if not (root / layout).exists():
            run_on_ranks(ranks_of(LAYOUTS[layout]), _save, list(CASES), LAYOUTS[layout], root / layout)
        return root / layout / case

    return path_of


@pytest.mark.parametrize("layout", ["tp1", "tp4", "tp2 x pp2"])
@pytest.mark.parametrize("case", CASES)
def test_reads_the_whole_weights_from_every_layout(case, layout, saved):
    description = CASES[case]
    checkpoint = MegatronCheckpoint(saved(case, layout))
    assert checkpoint.description == description
    assert checkpoint.iteration == 7
    assert checkpoint.progress["consumed_samples"] == 28
    assert checkpoint.conversion is None
    assert_holds(checkpoint, whole_weights(description))


def test_reads_rows(saved):
    checkpoint = MegatronCheckpoint(saved("plain", "tp4"))
    for name, weight in whole_weights(CASES["plain"]).items():
        for rows in (slice(0, 1), slice(7, 23), slice(len(weight) - 3, None), slice(5, 5), slice(20, 10)):
            assert torch.equal(checkpoint.read(name, rows), weight[rows]), (name, rows)


def test_reads_one_checkpoint_by_its_own_path(saved):
    path = saved("plain", "tp1") / "iter_0000007"
    assert MegatronCheckpoint(path).path == path


def test_reading_needs_no_process_groups_and_keeps_nothing_open(saved):
    assert not torch.distributed.is_initialized()
    checkpoint = MegatronCheckpoint(saved("plain", "tp1"), verify_hashes=False)
    assert all(isinstance(info, TensorInfo) for info in checkpoint.infos().values())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with the checkpoints iter_0000000 and, newer and of other weights, iter_0000009."""
    description = CASES["plain"]
    write(tmp_path / "both", description)
    other = {name: weight + 1 for name, weight in whole_weights(description).items()}
    newer = write_checkpoint(
        tmp_path / "newer",
        description,
        MemorySource(other),
        iteration=9,
        record_json=manifest_of(description).to_json(),
    )
    newer.rename(tmp_path / "both" / newer.name)
    (tmp_path / "both" / "latest").write_text(f"{newer.name}\n")
    return tmp_path / "both"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_takes_the_newest_good_checkpoint(copy, caplog):
    assert MegatronCheckpoint(copy).iteration == 9
    flip_a_bit(copy / "iter_0000009" / "__0_0.distcp")
    with caplog.at_level(logging.WARNING):
        assert MegatronCheckpoint(copy).iteration == 0
    assert "__0_0.distcp has changed (sha256 differs)" in caplog.text
    assert MegatronCheckpoint(copy, verify_hashes=False).iteration == 9, "hashes were not asked for"


def test_refuses_damaged_checkpoints(copy):
    newest = copy / "iter_0000009"
    (newest / "__0_0.distcp").write_bytes((newest / "__0_0.distcp").read_bytes()[:-100])
    with pytest.raises(DamagedCheckpointError, match="bytes instead of"):
        MegatronCheckpoint(newest, verify_hashes=False)
    (copy / "iter_0000000" / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="no good checkpoint"):
        MegatronCheckpoint(copy)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        MegatronCheckpoint(copy.parent)


def test_tells_how_much_is_checked(copy):
    told: list[tuple[int, int]] = []
    checkpoint = MegatronCheckpoint(copy, progress=lambda *count: told.append(count))
    large = sum(large_files(checkpoint.manifest).values())
    assert sum(done for done, _ in told) == large
    assert {total for _, total in told} == {large}


def _change_settings(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    change(settings)
    (checkpoint / "config.json").write_text(json.dumps(settings))
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, replace(manifest, files=hash_files(checkpoint, list_files(checkpoint))))


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda settings: settings.pop("architecture"), "config.json has no section or field 'architecture'"),
    (lambda settings: settings["model"].update(num_layers=5), r"not part of the model: decoder\.layers\.5"),
    (lambda settings: settings["model"].update(num_query_groups=1),
     r"linear_qkv\.weight \[64, 32\] instead of \[48, 32\]"),
    (lambda settings: settings["architecture"].update(vocab_size=999),
     r"embeddings\.weight \[61, 32\] instead of \[999, 32\]"),
    (lambda settings: settings["model"].update(hidden_siz=8), "model.hidden_siz is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_settings_that_do_not_belong_to_the_weights(tmp_path, change, message):
    path = write(tmp_path / "model", CASES["plain"])
    _change_settings(path, change)
    with pytest.raises(ValueError, match=message):
        MegatronCheckpoint(path)


# Writing


Restored = tuple[list[str], Tensor | None, int]
"""Parameters of a rank that are not what was written, logits (last stage), iteration."""


def _restore(cases: list[str], parallel: ParallelConfig, root: Path) -> dict[str, Restored]:
    found = {}
    for case in cases:
        initialize(parallel, seed=1)
        restored = restore(root / case, parallel)
        logits = compute_logits(restored.stage, draw_tokens(2, 24))
        found[case] = different_weights(restored.stage, CASES[case]), logits, restored.iteration
        parallel_state.destroy_model_parallel()
    return found


def _logits(cases: list[str]) -> dict[str, Tensor | None]:
    found = {}
    for case in cases:
        found[case] = compute_logits(stage_with(CASES[case], ONE).eval(), draw_tokens(2, 24))
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, each in many chunks and several files."""
    root = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distcp, "row_chunks", partial(row_chunks, chunk_bytes=900))
        patched.setattr(distcp, "FILE_BYTES", 40_000)
        for case, description in CASES.items():
            write(root / case, description)
    return root


@pytest.fixture(scope="module")
def restored(written: Path) -> Callable[[str, str], tuple[list[Restored], Tensor]]:
    """What the ranks of a layout make of a case, and the logits that it must give; a layout does all cases
    when first asked for."""
    known: dict[str, list[dict[str, Restored]]] = {}
    expected = run_on_ranks(1, _logits, list(CASES))[0]

    def results_of(case: str, layout: str) -> tuple[list[Restored], Tensor]:
        if layout not in known:
            ranks = ranks_of(LAYOUTS[layout])
            known[layout] = run_on_ranks(ranks, _restore, list(CASES), LAYOUTS[layout], written)
        return [results[case] for results in known[layout]], expected[case]

    return results_of


@pytest.mark.parametrize("layout", ["tp1", "tp4", "tp2 x pp2"])
@pytest.mark.parametrize("case", CASES)
def test_every_layout_loads_what_was_written(case, layout, restored):
    results, expected = restored(case, layout)
    tolerance = LARGEST_LOGIT_DIFFERENCE if layout != "tp1" else 0.0
    assert [different for different, _, _ in results] == [[]] * len(results)
    assert all((logits - expected).abs().max() <= tolerance for _, logits, _ in results if logits is not None)
    assert {iteration for _, _, iteration in results} == {0}


@pytest.mark.parametrize("case", CASES)
def test_reads_back_what_was_written(case, written):
    checkpoint = MegatronCheckpoint(written / case)
    assert len(list(checkpoint.path.glob("*.distcp"))) > 2
    assert checkpoint.path == written / case / "iter_0000000"
    assert read_pointer(written / case) == checkpoint.path.name
    assert [info.problem for info in list_checkpoints(written / case)] == [None]
    assert checkpoint.description == CASES[case]
    assert checkpoint.conversion == replace(manifest_of(CASES[case]), created=checkpoint.conversion.created)
    assert_holds(checkpoint, whole_weights(CASES[case]))


def test_tells_how_much_is_written(tmp_path):
    told: list[tuple[int, int]] = []
    write(tmp_path / "model", CASES["plain"], progress=lambda *count: told.append(count))
    size = sum(info.nbytes for info in CASES["plain"].expected_tensors().values())
    assert sum(done for done, _ in told) == size
    assert {total for _, total in told} == {size}


def _pass_on(before: Path, after: Path, case: str, parallel: ParallelConfig, iteration: int) -> None:
    initialize(parallel, seed=1)
    save(restore(before, parallel).stage, CASES[case], after, iteration)


def test_resharding_changes_no_bit(tmp_path):
    case = "cla, biases, norms, tied"
    before = write(tmp_path / "tp1", CASES[case]).parent
    for layout in ("tp4", "tp2"):
        parallel = LAYOUTS[layout]
        run_on_ranks(ranks_of(parallel), _pass_on, before, tmp_path / layout, case, parallel, 3)
        before = tmp_path / layout
        assert_holds(MegatronCheckpoint(before), whole_weights(CASES[case]))


def test_writes_in_another_dtype(tmp_path):
    description = CASES["plain"]
    checkpoint = MegatronCheckpoint(write(tmp_path / "model", description, dtype=torch.bfloat16))
    assert checkpoint.description == replace(description, dtype=torch.bfloat16)
    assert checkpoint.settings["train"]["precision"] == "bf16"
    assert_holds(checkpoint, {name: weight.bfloat16() for name, weight in whole_weights(description).items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype_of_the_source(tmp_path, dtype):
    description = describe(EVERY_MAP["plain"], dtype)
    checkpoint = MegatronCheckpoint(write(tmp_path / "model", description))
    assert checkpoint.settings["train"]["precision"] == {torch.float16: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert_holds(checkpoint, whole_weights(description))


def test_the_file_beside_it_describes_the_model_to_a_run(tmp_path):
    description = CASES["dmc"]
    write(tmp_path / "model", description)
    run = config_from_dict(load_text_yaml((tmp_path / "model" / MODEL_FILE_NAME).read_text()))
    assert (run.model, run.compression) == (description.model, description.compression)


@dataclass(frozen=True)
class _Failing:
    """Raises when it has read half of the tensors."""

    source: MemorySource
    error: BaseException

    def infos(self) -> dict[str, TensorInfo]:
        return self.source.infos()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if ".3." in name:
            raise self.error
        return self.source.read(name, rows)


@pytest.mark.parametrize("error", [ConversionError("NaN"), KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_left_of_what_did_not_come_to_its_end(tmp_path, error, is_there):
    directory = tmp_path / "model"
    if is_there:
        directory.mkdir()
    source = _Failing(MemorySource(whole_weights(CASES["plain"])), error)
    with pytest.raises(type(error)) as raised, staged(directory) as folder:
        write_checkpoint(folder, CASES["plain"], source, record_json={})
    assert raised.value is error
    assert list(tmp_path.rglob("*")) == ([directory] if is_there else [])


def test_a_full_disk(tmp_path, monkeypatch):
    def write_a_little(self: object, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(distcp.HashedFile, "write", write_a_little)
        full = pytest.raises(ConversionError, match=r"No space left on device.*Nothing is left")
        with full, staged(tmp_path / "model") as folder:
            write(folder, CASES["plain"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty(tmp_path):
    write(tmp_path / "model", CASES["plain"])
    with pytest.raises(ConversionError, match="is not empty"):
        write(tmp_path / "model", CASES["plain"])


def test_tensors_that_are_not_those_of_the_model(tmp_path):
    weights = whole_weights(CASES["plain"])
    del weights["decoder.final_layernorm.weight"]
    weights["extra.weight"] = torch.zeros(2)
    weights[EMBEDDING] = weights[EMBEDDING][: VOCAB - 1]
    with pytest.raises(ModelError) as raised:
        write_checkpoint(tmp_path / "model", CASES["plain"], MemorySource(weights), record_json={})
    for part in (
        "missing: decoder.final_layernorm",
        "not part of the model: extra",
        "[60, 32] instead of [61, 32]",
    ):
        assert part in str(raised.value)
    assert not (tmp_path / "model").exists()

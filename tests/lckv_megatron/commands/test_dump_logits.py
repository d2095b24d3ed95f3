"""Logits of any layout are those of one process, row by row; bad token files are named."""

from pathlib import Path

import numpy as np
import pytest

from lckv_megatron.commands.dump_logits import main
from megatron_ext.config import ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.evaluation.logits_file import read_tokens
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks

YOCO = {"layer_types": "0s_1s_2_2", "sliding_window": 8}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(
        1, train, tiny_run(compression=YOCO, checkpoint={"save": str(folder)}, train={"train_iters": 3})
    )
    return folder


def dump(checkpoints: str, tokens: str, output: str, *layout: str) -> int:
    return main(
        ["--load", checkpoints, "--tokens", tokens, "--output", output, "--rows_at_once", "2", *layout]
    )


def test_every_layout_gives_the_same_logits(checkpoints: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(97, size=(5, 11))
    np.save(tmp_path / "tokens.npy", tokens)
    found = []
    for name, ranks, tp, pp, cp in [
        ("one", 1, 1, 1, 1),
        ("tp", 2, 2, 1, 1),
        ("pp", 2, 1, 2, 1),
        ("both", 4, 2, 2, 1),
        ("dp", 2, 1, 1, 1),
        ("cp", 4, 1, 1, 2),
    ]:
        layout = [f"--tensor_model_parallel_size={tp}", f"--pipeline_model_parallel_size={pp}"]
        layout.append(f"--context_parallel_size={cp}")
        arguments = (str(checkpoints), str(tmp_path / "tokens.npy"), str(tmp_path / f"{name}.npy"), *layout)
        assert run_on_ranks(ranks, dump, *arguments) == [0] * ranks
        found.append(np.load(tmp_path / f"{name}.npy"))
    assert found[0].shape == (5, 11, 97)
    assert found[0].dtype == np.float32
    assert np.isfinite(found[0]).all()
    assert np.abs(found[0][0] - found[0][1]).max() > 0.01, "rows differ"
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 3), np.int32), r"is int32 \[2, 3\]; it must be int64 \[B, T\]"),
        (np.zeros(3, np.int64), r"is int64 \[3\]; it must be"),
        (np.full((1, 2), 97), "holds the token 97; the model knows 0 to 96"),
        (np.full((1, 2), -1), "holds the token -1"),
    ],
)
def test_bad_tokens(array: np.ndarray, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", array)
    with pytest.raises(ConfigError, match=said):
        read_tokens(tmp_path / "tokens.npy", 97)


def test_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens\.npy cannot be read as a \.npy file"):
        read_tokens(tmp_path / "tokens.npy", 97)


def test_a_layout_that_cannot_be(checkpoints: Path, tmp_path: Path) -> None:
    (said,) = run_on_ranks(1, restore_error, str(checkpoints), 2)
    assert "1 processes were started" in said and "parallel.pipeline_model_parallel_size is 2" in said
    (said,) = run_on_ranks(1, restore_error, str(checkpoints), 3)
    assert "model.num_attention_heads" in said


def restore_error(checkpoints: str, pp_or_tp: int) -> str:
    from megatron_ext.parallel.process_groups import initialize
    from megatron_ext.restoring.model import restore

    initialize(ParallelConfig(), seed=1)
    wanted = (
        ParallelConfig(pipeline_model_parallel_size=2)
        if pp_or_tp == 2
        else ParallelConfig(tensor_model_parallel_size=3)
    )
    with pytest.raises(ConfigError) as caught:
        restore(Path(checkpoints), wanted)
    return str(caught.value)


def test_no_folder_to_write_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert dump("nowhere", "tokens.npy", str(tmp_path / "missing" / "logits.npy")) == 2
    assert "missing does not exist; make it, or choose another" in capfd.readouterr().err

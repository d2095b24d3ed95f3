import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.data.job import PreprocessingJob
from megatron_ext.data.merging import merge_shards
from megatron_ext.data.prefix_lock import locked
from megatron_ext.data.preprocessing import preprocess
from megatron_ext.data.sources import find_sources
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import write_dataset

PROGRAM = """
import sys, time
from megatron_ext.data.prefix_lock import locked
with locked(sys.argv[1:]):
    print("taken", flush=True)
    time.sleep(120)
"""
IN_USE = (
    r"^--output-prefix: .*out\S* is in use by .*process \d+.* choose another --output-prefix\. If it does"
)


@pytest.fixture
def other(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another job, which writes under a prefix."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / request.param)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def job(folder: Path, model: Path, keys: tuple[str, ...] = ("text",)) -> PreprocessingJob:
    (folder / "in.jsonl").write_text('{"text": "hello", "more": "world"}\n')
    sources = tuple(find_sources([str(folder / "in.jsonl")]))
    return PreprocessingJob(sources, str(folder / "out"), "sentencepiece", str(model), json_keys=keys)


@pytest.mark.parametrize("other", ["out"], indirect=True)
def test_a_second_job_is_refused_until_the_first_one_ends(
    other: subprocess.Popen[str], tmp_path: Path, sentencepiece_model: Path
) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=IN_USE):
            preprocess(job(tmp_path, sentencepiece_model), overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*before, "in.jsonl"])
    prefix = write_dataset(tmp_path / "part", [[1, 2]])
    with pytest.raises(ConfigError, match=IN_USE):
        merge_shards([prefix], str(tmp_path / "out"))
    other.kill()
    other.wait()
    preprocess(job(tmp_path, sentencepiece_model))
    names = {path.name for path in tmp_path.iterdir() if path.name != "in.jsonl" and "part" not in path.name}
    assert names == {"out.bin", "out.idx", "out.dataset.json"}


@pytest.mark.parametrize("other", ["out_more"], indirect=True)
def test_datasets_of_several_keys_are_each_of_one_job(
    other: subprocess.Popen[str], tmp_path: Path, sentencepiece_model: Path
) -> None:
    with pytest.raises(ConfigError, match=IN_USE):
        preprocess(job(tmp_path, sentencepiece_model, keys=("text", "more")))
    preprocess(job(tmp_path, sentencepiece_model))
    assert not (tmp_path / ".out.lock").exists()


def fail_under(prefix: Path) -> None:
    with locked([str(prefix)]):
        assert (prefix.parent / ".out.lock").is_dir()
        raise RuntimeError


def test_an_error_gives_the_prefix_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_under(tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"^--output-prefix .*out cannot be written: .*Not a directory"):
        fail_under(tmp_path / "out" / "out")

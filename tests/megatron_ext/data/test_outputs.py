"""Nobody's files are destroyed: what is an input, or no dataset of ours, is refused, untouched."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data import preprocessing
from megatron_ext.data.description import manifest_path, read_manifest
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.job import PreprocessingJob
from megatron_ext.data.merging import merge_shards
from megatron_ext.data.outputs import OutputFiles
from megatron_ext.data.preprocessing import preprocess
from megatron_ext.data.sources import find_sources
from megatron_ext.errors import ConfigError
from tests.lckv.tokenizer_json import TEXTS
from tests.megatron_ext.data.builders import write_dataset
from tests.megatron_ext.data.test_description import earlier

LINES = b"".join(json.dumps({"text": text, "more": text}).encode() + b"\n" for text in TEXTS)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(sentencepiece_model: Path) -> Callable[..., Any]:
    """Runs a job on d/corpus.json into a prefix."""

    def run(
        prefix: str, inputs: tuple[str, ...] = ("d/corpus.json",), overwrite: bool = False, **options: Any
    ) -> Any:
        job = PreprocessingJob(
            tuple(find_sources(inputs, text_format="jsonl")),
            prefix,
            "sentencepiece",
            str(sentencepiece_model),
            **options,
        )
        return preprocess(job, overwrite=overwrite)

    Path("d/corpus.json").write_bytes(LINES)
    return run


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


MODES = [{}, {"overwrite": True}, {"shards": 3}, {"shards": 3, "overwrite": True}]


@pytest.mark.parametrize("mode", MODES)
def test_a_corpus_beside_the_output_is_not_touched(make: Callable[..., Any], mode: dict[str, Any]) -> None:
    """The description has a name of its own; PREFIX.json is whoever's it is."""
    Path("d/corpus-00000.json").write_text("{}")
    before = contents()
    for _ in range(2):
        make("d/corpus", **mode)
    assert contents().items() >= before.items()
    assert read_manifest("d/corpus" if "shards" not in mode else "d/corpus-00000") is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", ["bin", "idx", "dataset.json"])
@pytest.mark.parametrize("by", ["name", "link", "hard link", "spelling"])
def test_an_output_that_is_an_input(
    make: Callable[..., Any], mode: dict[str, Any], ending: str, by: str
) -> None:
    output = Path(f"d/corpus{'-00001' if 'shards' in mode else ''}.{ending}")
    output.write_bytes(LINES)
    given = {"name": str(output), "link": "link", "hard link": "link", "spelling": f"d/../{output}"}[by]
    if by == "link":
        Path("link").symlink_to(output)
    elif by == "hard link":
        os.link(output, "link")
    before = contents()
    with pytest.raises(ConfigError, match=f"would replace the input {output}"):
        make("d/corpus", (given,), **mode)
    assert contents() == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("ending", "content", "what"),
    [
        ("bin", b"firmware", "has no corpus.*dataset.json beside it"),
        ("idx", b"an index of a book", "is no index of a dataset"),
        ("dataset.json", b'{"about": "another dataset"}', "does not describe a dataset"),
        ("dataset.json", b"", "does not describe a dataset"),
    ],
)
def test_an_output_that_is_not_ours(
    make: Callable[..., Any], mode: dict[str, Any], ending: str, content: bytes, what: str
) -> None:
    Path(f"d/corpus{'-00002' if 'shards' in mode else ''}.{ending}").write_bytes(content)
    before = contents()
    with pytest.raises(
        ConfigError, match=rf"{ending} is in the way and {what}.*Give another --output-prefix"
    ) as error:
        make("d/corpus", **mode)
    assert "delete" not in str(error.value)
    assert contents() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_programs_dataset(make: Callable[..., Any], overwrite: bool) -> None:
    write_dataset("d/corpus", [[1, 2]], manifest=False)
    before = contents()
    with pytest.raises(ConfigError, match=r"corpus.bin is in the way and has no"):
        make("d/corpus", overwrite=overwrite)
    write_dataset("d/part", [[1, 2]])
    with pytest.raises(ConfigError, match=r"corpus.bin is in the way and has no"):
        merge_shards(["d/part"], "d/corpus", overwrite=overwrite)
    assert contents().items() >= before.items()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_outputs_that_are_no_files(make: Callable[..., Any], overwrite: bool, kind: str) -> None:
    path = Path("d/corpus.bin")
    {"folder": path.mkdir, "link": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path)}[
        kind
    ]()
    with pytest.raises(
        ConfigError, match=r"corpus.bin is in the way and is (no plain file|a link that leads)"
    ):
        make("d/corpus", overwrite=overwrite)
    assert os.path.lexists(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_working_folder_is_ours_alone(make: Callable[..., Any], overwrite: bool) -> None:
    folder = Path("d/.corpus.unfinished")
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"unfinished is in the way and holds diary.txt, which no dataset needs"
    ):
        make("d/corpus", overwrite=overwrite)
    with pytest.raises(ConfigError, match=r"holds diary.txt"):
        merge_shards([write_dataset("d/part", [[1]])], "d/corpus", overwrite=overwrite)
    assert (folder / "diary.txt").read_text() == "mine"
    (folder / "diary.txt").unlink()
    folder.rmdir()
    folder.write_text("mine")
    with pytest.raises(ConfigError, match="unfinished is in the way and is not the folder"):
        make("d/corpus", overwrite=overwrite)
    assert folder.read_text() == "mine"


def test_overwriting_one_job_spares_the_datasets_beside_it(make: Callable[..., Any]) -> None:
    make("d/corpus", shards=3)
    make("d/corpus-00007")
    make("d/corpus_text")
    parts = contents()
    make("d/corpus")
    make("d/corpus", overwrite=True)
    assert contents().items() >= parts.items()
    with pytest.raises(ConfigError, match="corpus-00007 is of another job: size of the shards differs"):
        make("d/corpus", shards=3)
    before = contents()
    make("d/corpus2", shards=2)
    assert contents().items() >= before.items()


def test_overwriting_leaves_no_shard_of_before(make: Callable[..., Any]) -> None:
    make("d/corpus", shards=4)
    make("d/corpus", shards=2, overwrite=True)
    assert sorted(path.name for path in Path("d").glob("*.bin")) == ["corpus-00000.bin", "corpus-00001.bin"]


def test_overwriting_waits_until_the_job_can_begin(make: Callable[..., Any], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    make("d/corpus")
    pq.write_table(pa.table({"title": TEXTS}), "a.parquet")
    before = contents()
    job = PreprocessingJob(tuple(find_sources(["a.parquet"])), "d/corpus", "sentencepiece", "none.model")
    for prepared in (job, replace(job, sources=tuple(find_sources(["d/corpus.json"], text_format="jsonl")))):
        with pytest.raises(ConfigError, match=r"no column 'text'|none.model' does not exist"):
            preprocess(prepared, overwrite=True)
    assert contents() == before


def test_earlier_versions_are_ours(make: Callable[..., Any]) -> None:
    make("d/new")
    for suffix in ("bin", "idx", "dataset.json"):
        Path(f"d/new.{suffix}").rename(f"d/old.{suffix}")
    description = earlier("d/old")
    with pytest.raises(
        ConfigError, match="d/old is of another job: an earlier version made it, which did not note"
    ):
        make("d/old")
    make("d/old", overwrite=True)
    assert not description.exists()
    assert read_manifest("d/old") is not None


def test_merging_spares_its_inputs_and_others(make: Callable[..., Any]) -> None:
    make("d/part", shards=3)
    make("d/whole")
    parts = [f"d/part-0000{number}" for number in range(3)]
    Path("link.bin").symlink_to("d/part-00001.bin")
    before = contents()
    for output in ("d/part-00000", "./d/../d/part-00002", "link"):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="would replace the input"):
                merge_shards(parts, output, overwrite=overwrite)
    with pytest.raises(ConfigError, match="d/whole is a dataset already, and another one"):
        merge_shards(parts, "d/whole")
    with pytest.raises(ConfigError, match=r"is given twice \(the same dataset as d/part-00000\)"):
        merge_shards([*parts, "./d/part-00000"], "d/twice")
    assert contents() == before
    merged = merge_shards(parts, "d/merged")
    times = {path: path.stat().st_mtime_ns for path in Path("d").glob("merged*")}
    assert merge_shards(parts, "d/merged") == merged
    assert {path: path.stat().st_mtime_ns for path in Path("d").glob("merged*")} == times
    assert merge_shards(parts, "d/whole", overwrite=True) == merged
    assert read_manifest("d/whole") == merged


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_process_that_ends_while_files_get_their_names(
    make: Callable[..., Any], moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one gives them the rest of their names; what is there already is known to be ours."""
    make("d/whole")
    move_all = OutputFiles._move_all

    def stops(self: OutputFiles) -> None:
        for name, place in [*self._places.items()][:moved]:
            (self.folder / name).replace(place)
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFiles, "_move_all", stops)
    with pytest.raises(KeyboardInterrupt):
        make("d/corpus")
    monkeypatch.setattr(OutputFiles, "_move_all", move_all)
    monkeypatch.setattr(preprocessing, "encode_records", lambda *args, **options: pytest.fail("made again"))
    assert not manifest_path("d/corpus").exists()
    make("d/corpus")
    assert Path("d/corpus.bin").read_bytes() == Path("d/whole.bin").read_bytes()
    assert read_manifest("d/corpus") == read_manifest("d/whole")
    assert not Path("d/.corpus.unfinished").exists()


def test_a_process_that_ends_while_it_writes(make: Callable[..., Any]) -> None:
    writer = IndexedWriter("d/corpus", "uint16")
    writer._bin.write(b"half")
    make("d/corpus")
    assert not Path("d/.corpus.unfinished").exists()

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from lckv_megatron.commands.preprocess import main
from megatron_ext.data.description import DatasetManifest, read_manifest
from megatron_ext.data.indexed import index_lengths, read_index, token_chunks
from megatron_ext.data.job import PreprocessingJob
from megatron_ext.data.preprocessing import preprocess
from megatron_ext.data.sources import find_sources
from megatron_ext.data.tokenizers import load_tokenizer
from tests.lckv.tokenizer_json import TEXTS, write_tokenizer_json
from tests.megatron_ext.data.builders import train_sentencepiece

pytestmark = pytest.mark.usefixtures("in_folder")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(texts: list[str] = TEXTS, **more: Any) -> bytes:
    return b"".join(json.dumps({"text": text} | more).encode() + b"\n" for text in texts)


def documents_in(prefix: str) -> list[list[int]]:
    tokens = np.concatenate([*token_chunks(prefix, read_index(prefix))])
    ends = np.cumsum(np.concatenate([*index_lengths(prefix)]))
    return [part.tolist() for part in np.split(tokens, ends[:-1])]


def expected(tokenizer_model: str, texts: list[str], eod: bool = True) -> list[list[int]]:
    tokenizer = load_tokenizer("sentencepiece", tokenizer_model)
    return [tokenizer.encode(text) + ([tokenizer.eod] if eod else []) for text in texts]


def run(tokenizer_model: str, *arguments: str) -> int:
    return main([*arguments, "--tokenizer-type", "sentencepiece", "--tokenizer-model", tokenizer_model])


def manifest_of(prefix: str) -> DatasetManifest:
    manifest = read_manifest(prefix)
    assert manifest is not None
    return manifest


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path.cwd().iterdir() if path.name.startswith("part-")}


def test_a_dataset_and_its_description(tokenizer_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    assert run(tokenizer_model, "--input", "corpus.jsonl", "--output-prefix", "out/corpus") == 0
    documents = expected(tokenizer_model, TEXTS)
    assert documents_in("out/corpus") == documents
    tokenizer = load_tokenizer("sentencepiece", tokenizer_model)
    manifest = manifest_of("out/corpus")
    tokens = sum(map(len, documents))
    assert manifest.documents == 60
    assert manifest.tokens == tokens
    assert manifest.max_token_id == max(map(max, documents))
    assert (manifest.tokenizer_type, manifest.tokenizer_fingerprint) == (
        "sentencepiece",
        tokenizer.fingerprint,
    )
    assert (manifest.vocab_size, manifest.eod, manifest.dtype, manifest.append_eod) == (
        320,
        2,
        "uint16",
        True,
    )
    assert [(source.path, source.bytes) for source in manifest.sources] == [("corpus.jsonl", len(lines()))]
    output = capsys.readouterr()
    assert f"out/corpus: 60 documents, {tokens:,} tokens (uint16)" in output.out
    assert "MB/s" in output.err
    assert "tokens/s" in output.err


def test_all_kinds_of_input_in_order(tokenizer_model: str) -> None:
    Path("in").mkdir()
    Path("in/a.jsonl").write_bytes(lines(TEXTS[:10]))
    Path("in/b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[10:20])))
    Path("in/c.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS[20:30])))
    Path("in/d.txt").write_text(TEXTS[30])
    Path("in/e.txt.gz").write_bytes(gzip.compress(TEXTS[31].encode()))
    assert run(tokenizer_model, "--input", "in", "--output-prefix", "all", "--no-append-eod") == 0
    assert documents_in("all") == expected(tokenizer_model, TEXTS[:32], eod=False)
    assert not manifest_of("all").append_eod
    arguments = [
        "--input",
        "in/*.txt",
        "in/a.jsonl",
        "in/b*",
        "--suffix",
        "a.jsonl",
        "d.txt",
        ".gz",
        "--output-prefix",
        "some",
    ]
    assert run(tokenizer_model, *arguments) == 0
    assert documents_in("some") == expected(tokenizer_model, [TEXTS[30], *TEXTS[:20]])


@pytest.mark.parametrize("shards", [[], ["--shards", "3"]])
def test_workers_change_nothing(
    tokenizer_model: str, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ext.data.encoding._BATCH_RECORDS", 7)
    Path("corpus.jsonl").write_bytes(lines())
    Path("one").mkdir()
    Path("three").mkdir()
    for name, workers in (("one", "1"), ("three", "3")):
        monkeypatch.chdir(name)
        arguments = ["--input", "../corpus.jsonl", "--output-prefix", "out", "--workers", workers, *shards]
        assert run(tokenizer_model, *arguments) == 0
        monkeypatch.chdir("..")
    contents = [{path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("one", "three")]
    assert contents[0] == contents[1]
    assert len(contents[0]) == (9 if shards else 3)


def test_several_keys(tokenizer_model: str) -> None:
    Path("corpus.jsonl").write_bytes(
        b'{"title": "hello", "text": "world word"}\n{"title": "", "text": "corpus"}\n'
    )
    keys = ["--json-keys", "title", "text"]
    assert run(tokenizer_model, "--input", "corpus.jsonl", "--output-prefix", "out", *keys) == 0
    assert documents_in("out_title") == expected(tokenizer_model, ["hello"])
    assert documents_in("out_text") == expected(tokenizer_model, ["world word", "corpus"])
    assert [manifest_of(f"out_{key}").json_key for key in ("title", "text")] == ["title", "text"]


def test_another_tokenizer() -> None:
    Path("corpus.jsonl").write_bytes(lines())
    write_tokenizer_json(Path("tokenizer.json"))
    tokenizer = ["--tokenizer-type", "huggingface", "--tokenizer-model", "tokenizer.json"]
    assert main(["--input", "corpus.jsonl", "--output-prefix", "out", *tokenizer]) == 0
    loaded = load_tokenizer("huggingface", "tokenizer.json")
    assert documents_in("out") == [[*loaded.encode(text), loaded.eod] for text in TEXTS]


def test_shards_merge_into_the_whole(tokenizer_model: str) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    arguments = ["--input", "corpus.jsonl"]
    assert run(tokenizer_model, *arguments, "--output-prefix", "whole") == 0
    assert run(tokenizer_model, *arguments, "--output-prefix", "s/part", "--shards", "4") == 0
    counts = [manifest_of(f"s/part-{number:05d}").documents for number in range(4)]
    assert sum(counts) == 60
    assert min(counts) >= 10
    assert main(["--merge", "--input", "s/part-*.idx", "--output-prefix", "merged"]) == 0
    assert Path("merged.bin").read_bytes() == Path("whole.bin").read_bytes()
    assert Path("merged.idx").read_bytes() == Path("whole.idx").read_bytes()
    merged, whole = manifest_of("merged"), manifest_of("whole")
    assert replace(merged, content=whole.content) == whole


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst"])
@pytest.mark.parametrize("complete", [1, 3, 5])
def test_an_interrupted_job_goes_on_after_its_last_shard(
    tokenizer_model: str, name: str, complete: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    Path(name).write_bytes(pack(lines(TEXTS[:25])))
    Path("more.jsonl").write_bytes(lines(TEXTS[25:]))
    job = ["--input", name, "more.jsonl", "--output-prefix", "part", "--shards", "5"]
    assert run(tokenizer_model, *job) == 0
    everything = files()
    for path in Path.cwd().glob("part-*"):
        if int(path.name[5:10]) >= complete:
            path.unlink()
    monkeypatch.setattr("megatron_ext.data.encoding._BATCH_RECORDS", 3)
    kept = {path.name: path.stat().st_mtime_ns for path in Path.cwd().glob("part-*")}
    assert run(tokenizer_model, *job) == 0
    assert files() == everything
    assert {name: Path(name).stat().st_mtime_ns for name in kept} == kept


def test_a_failure_leaves_only_complete_shards(
    tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("corpus.jsonl").write_bytes(lines(TEXTS[:45]) + b'{"text": 5}\n' + lines(TEXTS[45:]))
    job = ["--input", "corpus.jsonl", "--output-prefix", "part", "--shards", "3"]
    assert run(tokenizer_model, *job) == 2
    assert "error: corpus.jsonl:46: 'text' is not a text but int." in capsys.readouterr().err
    assert sorted(path.name for path in Path.cwd().glob("part*")) == [
        f"part-0000{number}.{name}" for number in (0, 1) for name in ("bin", "dataset.json", "idx")
    ]


def test_a_job_that_is_done_is_not_done_again(tokenizer_model: str) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    for arguments in (["--output-prefix", "whole"], ["--output-prefix", "part", "--shards", "2"]):
        assert run(tokenizer_model, "--input", "corpus.jsonl", *arguments) == 0
        before = {path: path.stat().st_mtime_ns for path in Path.cwd().iterdir()}
        assert run(tokenizer_model, "--input", "corpus.jsonl", *arguments) == 0
        assert {path: path.stat().st_mtime_ns for path in Path.cwd().iterdir()} == before


def test_output_of_another_job_is_not_mixed_in(
    tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    job = ["--input", "corpus.jsonl", "--output-prefix", "part", "--shards", "4"]
    assert run(tokenizer_model, *job) == 0
    for changes, message in (
        (["--no-append-eod"], "part-00000 is of another job: append_eod differs."),
        (["--json-keys", "title"], "part-00000 is of another job: json_key, json_keys differs."),
        (["--shards", "3"], "part-00000 is of another job: size of the shards differs."),
    ):
        assert run(tokenizer_model, *job, *changes) == 2
        assert f"error: {message}" in capsys.readouterr().err
    Path("corpus.jsonl").write_bytes(lines(TEXTS[:50]))
    assert run(tokenizer_model, *job) == 2
    assert "part-00000 is of another job: sources, size of the shards differs." in capsys.readouterr().err
    assert run(tokenizer_model, *job[:-1], "2", "--overwrite") == 0
    assert sorted(path.name for path in Path.cwd().glob("part*.bin")) == ["part-00000.bin", "part-00001.bin"]


def test_damaged_output_is_not_taken_for_complete(
    tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    job = ["--input", "corpus.jsonl", "--output-prefix", "part", "--shards", "2"]
    assert run(tokenizer_model, *job) == 0
    Path("part-00000.bin").write_bytes(b"")
    assert run(tokenizer_model, *job) == 2
    assert "part-00000.bin: 0 bytes, but" in capsys.readouterr().err


def test_bad_lines_are_counted_on_request(
    tokenizer_model: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("corpus.jsonl").write_bytes(
        lines(TEXTS[:3]) + b'{"text": \n[]\n\n{"text": ""}\n' + lines(TEXTS[3:5])
    )
    arguments = ["--input", "corpus.jsonl", "--output-prefix", "out"]
    assert run(tokenizer_model, *arguments) == 2
    assert "error: corpus.jsonl:4: not valid JSON (" in capsys.readouterr().err
    assert run(tokenizer_model, *arguments, "--skip-bad-lines", "--workers", "2") == 0
    assert documents_in("out") == expected(tokenizer_model, TEXTS[:5])
    assert manifest_of("out").skipped_records == 2
    assert "5 documents" in (output := capsys.readouterr().out)
    assert "2 bad records skipped" in output
    assert "skipped corpus.jsonl:5: a JSON object is needed" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl"], "input 'none.jsonl' stands for no file"),
        (["--input", "empty.jsonl"], "no document in empty.jsonl: all are empty or bad."),
        (
            ["--input", "text.txt", "--json-keys", "a", "b"],
            "--json-keys a b needs JSON lines or Parquet files, but text.txt is a text.",
        ),
        (["--input", "bad.jsonl.gz"], "bad.jsonl.gz: truncated or damaged"),
        (
            ["--input", "long.jsonl", "--max-document-mib", "1"],
            "long.jsonl:1: the document is longer than 1 MiB",
        ),
        (
            ["--input", "text.txt", "--tokenizer-model", "none.model"],
            "tokenizer_model='none.model' does not exist",
        ),
        (["--merge", "--input", "none-*.idx"], "--input 'none-*.idx' stands for no file"),
        (["--merge", "--input", "none"], "none.dataset.json not found"),
    ],
)
def test_bad_input(
    tokenizer_model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_bytes(b'{"text": ""}\n\n')
    Path("text.txt").write_text("text")
    Path("bad.jsonl.gz").write_bytes(gzip.compress(lines())[:50])
    Path("long.jsonl").write_bytes(lines(["x" * (1 << 20)]))
    tokenizer = ["--tokenizer-type", "sentencepiece", "--tokenizer-model", tokenizer_model]
    assert main([*tokenizer, "--output-prefix", "out", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(Path.cwd().glob("out*"))


def test_what_cannot_be_merged(tokenizer_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    job = ["--input", "corpus.jsonl", "--output-prefix"]
    assert run(tokenizer_model, *job, "part", "--shards", "3") == 0
    assert run(tokenizer_model, *job, "other", "--no-append-eod") == 0
    part = [f"part-{number:05d}" for number in range(3)]
    for inputs, message in (
        ([part[0], part[2]], "before part-00002, shard number 2, belongs shard number 1"),
        (part[:2], "part-00001 is not the last shard of its job"),
        ([*part, "other"], "other and part-00000 cannot be merged: append_eod differs"),
    ):
        assert main(["--merge", "--input", *inputs, "--output-prefix", "merged"]) == 2
        assert message in capsys.readouterr().err
    Path("part-00001.idx").unlink()
    assert main(["--merge", "--input", *part, "--output-prefix", "merged"]) == 2
    assert "part-00001.idx not found" in capsys.readouterr().err
    assert not list(Path.cwd().glob("merged*"))


def test_a_tokenizer_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    assert main(["--input", "corpus.jsonl", "--output-prefix", "out"]) == 2
    assert "--tokenizer-type and --tokenizer-model are needed" in capsys.readouterr().err


def test_progress_reaches_the_end(tokenizer_model: str) -> None:
    Path("corpus.jsonl.gz").write_bytes(gzip.compress(lines()))
    reports = []
    sources = tuple(find_sources(["corpus.jsonl.gz"]))
    job = PreprocessingJob(sources, "out", "sentencepiece", tokenizer_model, shards=4)
    preprocess(job, lambda stretch, tokens: reports.append((stretch, tokens)))
    assert reports[0][1] == 0
    assert sum(tokens for _, tokens in reports) == sum(manifest_of(f"out-{n:05d}").tokens for n in range(4))
    assert reports[-1][0].disk_bytes == sources[0].size
    assert reports[-1][0].end.text_bytes == len(lines())


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples" in text
    assert "--merge --input 'shards/big-*.idx'" in text


MEASURE = """
import re, sys
from pathlib import Path
from lckv_megatron.commands.preprocess import main
status = main(sys.argv[1:])
# Not getrusage: that knows the memory of the process that started this one too.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def peak_kib(*arguments: str) -> int:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", MEASURE, *arguments]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return int(output.stdout.split()[-1])


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc, which is Linux's"
)
def test_memory_does_not_grow_with_the_input(tokenizer_model: str) -> None:
    """Short documents: their index shows first. In lists of numbers it would take 15 MB here."""
    small, large = 10_000, 200_000
    for documents in (small, large):
        Path(f"{documents}.jsonl").write_bytes(b'{"text": "a"}\n' * documents)
    tokenizer = ["--tokenizer-type", "sentencepiece", "--tokenizer-model", tokenizer_model]
    peaks = [
        peak_kib("--input", f"{size}.jsonl", "--output-prefix", f"out{size}", *tokenizer)
        for size in (small, large)
    ]
    merged = peak_kib("--merge", "--input", f"out{large}", "--output-prefix", "merged")
    assert read_index("merged").documents == large
    assert peaks[1] - peaks[0] < 6000
    assert peaks[1] < 150_000
    assert merged - peaks[0] < 6000


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_the_input_survives(tokenizer_model: str, overwrite: list[str]) -> None:
    """Its name is what the description was called once."""
    Path("corpus.json").write_bytes(lines())
    for _ in range(2):
        assert run(tokenizer_model, "--input", "corpus.json", "--output-prefix", "corpus", *overwrite) == 0
        assert Path("corpus.json").read_bytes() == lines()
    assert documents_in("corpus") == expected(tokenizer_model, TEXTS)


def test_merging_asks_before_it_replaces(tokenizer_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("corpus.jsonl").write_bytes(lines())
    for prefix, options in (("part", ["--shards", "2"]), ("whole", ["--no-append-eod"])):
        assert run(tokenizer_model, "--input", "corpus.jsonl", "--output-prefix", prefix, *options) == 0
    merge = ["--merge", "--input", "part-*.dataset.json", "--output-prefix", "whole"]
    assert main(merge) == 2
    assert "error: whole is a dataset already, and another one." in capsys.readouterr().err
    assert main([*merge, "--overwrite"]) == 0
    assert documents_in("whole") == expected(tokenizer_model, TEXTS)


@pytest.mark.parametrize("begun", [False, True], ids=["while workers start", "while they tokenize"])
def test_a_signal_to_all_processes_leaves_complete_shards_only(tokenizer_model: str, begun: bool) -> None:
    """Ctrl-C comes to the program and its workers. One line, no traceback, and the same command goes on."""
    Path("corpus.jsonl").write_bytes(lines(TEXTS * 4000))
    command = ["--input", "corpus.jsonl", "--output-prefix", "out", "--workers", "2", "--shard-mib", "1"]
    command += ["--tokenizer-type", "sentencepiece", "--tokenizer-model", tokenizer_model]
    root = Path(__file__).parents[3]
    heeding = "import signal, sys\nfor number in (signal.SIGINT, signal.SIGTERM):\n"
    heeding += "    signal.signal(number, signal.SIG_DFL)\n"  # whatever the tests were told to ignore
    program = f"{heeding}from lckv_megatron.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "preprocess", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    )
    waited_for, deadline = "out-00000.idx" if begun else "*out*", time.monotonic() + 120
    while not [*Path().glob(waited_for)] and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.endswith("stopped by SIGINT\n")
    assert "Traceback" not in errors
    shards = {path.name.split(".")[0] for path in Path().glob("*out*")}
    for shard in shards:
        assert {path.name for path in Path().glob(f"*{shard}*")} == {
            f"{shard}{end}" for end in (".bin", ".idx", ".dataset.json")
        }
    assert bool(shards) == begun
    assert run(tokenizer_model, *command[: command.index("--tokenizer-type")]) == 0

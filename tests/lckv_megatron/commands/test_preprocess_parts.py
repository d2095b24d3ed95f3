"""Several machines make a dataset: the merged parts are what one machine would have made."""

import json
from pathlib import Path

import pytest

from lckv_megatron.commands.preprocess import main
from megatron_ext.data.description import read_manifest
from tests.lckv.tokenizer_json import TEXTS
from tests.megatron_ext.data.builders import train_sentencepiece

pytestmark = pytest.mark.usefixtures("corpus")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five files; the last has no text in its documents."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number in range(5):
        texts = TEXTS[number * 12 : (number + 1) * 12] if number < 4 else [""] * 30
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        Path(f"in/{number}.jsonl").write_text("".join(lines))


def run(tokenizer_model: str, prefix: str, *options: str) -> int:
    words = ["--input", "in", "--output-prefix", prefix, "--tokenizer-type", "sentencepiece"]
    return main([*words, "--tokenizer-model", tokenizer_model, *options])


def merge(*prefixes: str) -> int:
    return main(["--merge", "--input", *prefixes, "--output-prefix", "merged"])


@pytest.mark.parametrize("shards", [[], ["--shards", "2"]])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_merged_parts_are_the_dataset_of_one_machine(
    tokenizer_model: str, count: int, shards: list[str]
) -> None:
    assert run(tokenizer_model, "whole") == 0
    for index in reversed(range(count)):
        assert run(tokenizer_model, "parts/corpus", "--part", f"{index}/{count}", *shards) == 0
    assert merge("parts/corpus-*.idx") == 0
    for ending in ("bin", "idx"):
        assert Path(f"merged.{ending}").read_bytes() == Path(f"whole.{ending}").read_bytes()
    whole, merged = read_manifest("whole"), read_manifest("merged")
    assert whole is not None and merged is not None
    assert (merged.documents, merged.tokens, merged.sources) == (whole.documents, whole.tokens, whole.sources)
    assert merged.part is None


def test_a_part_that_is_run_again_is_complete(tokenizer_model: str) -> None:
    assert run(tokenizer_model, "corpus", "--part", "1/2") == 0
    before = Path("corpus-00001-of-00002.bin").stat()
    assert run(tokenizer_model, "corpus", "--part", "1/2") == 0
    assert Path("corpus-00001-of-00002.bin").stat() == before


def test_files_that_came_between_two_parts(tokenizer_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tokenizer_model, "corpus", "--part", "0/2") == 0
    Path("in/9.jsonl").write_text('{"text": "hello"}\n')
    assert run(tokenizer_model, "corpus", "--part", "1/2") == 0
    assert merge("corpus-*.idx") == 2
    assert "corpus-00001-of-00002 are parts of different lists of files" in capsys.readouterr().err
    assert run(tokenizer_model, "corpus", "--part", "0/2") == 2
    assert "corpus-00000-of-00002 is of another job: part" in capsys.readouterr().err


NAMES = [f"corpus-0000{index}-of-00003" for index in range(3)]
MISSING = "cannot merge: parts 0 to 2 of 3 belong together, and "


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (NAMES[:2], f"{MISSING}{NAMES[1]} is not the last one"),
        (NAMES[1:], f"{MISSING}{NAMES[1]} is where 0 belongs"),
        ([NAMES[0], NAMES[2]], f"{MISSING}{NAMES[2]} is where 1 belongs"),
        ([NAMES[0], "other"], f"{MISSING}other is none"),
        ([NAMES[0], "corpus-00001-of-00002"], f"{MISSING}corpus-00001-of-00002 is where 1 belongs"),
    ],
)
def test_a_missing_part_is_named(
    tokenizer_model: str, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in given:
        number, _, count = name.removeprefix("corpus-").partition("-of-")
        part = ["--part", f"{int(number)}/{int(count)}"] if count else []
        assert run(tokenizer_model, "corpus" if count else name, *part) == 0
    assert merge(*given) == 2
    assert said in capsys.readouterr().err
    assert not Path("merged.bin").exists()


def test_a_shard_of_another_part(tokenizer_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        assert run(tokenizer_model, "corpus", "--part", f"{index}/2", "--shards", "2") == 0
    first, second = "corpus-00000-of-00002-00000", "corpus-00001-of-00002-00001"
    assert merge(first, second) == 2
    assert f"{second} is a shard of another part than the shard before it" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["8/8", "1", "-1/8", "0/0", "1/2/3"])
def test_what_is_no_part(tokenizer_model: str, part: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tokenizer_model, "corpus", f"--part={part}")
    assert f"{part!r} is no part; I/N is wanted" in capfd.readouterr().err


def test_merging_takes_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--merge", "--input", "x", "--output-prefix", "y", "--part", "0/2"]) == 2
    assert "--part is for tokenizing; --merge takes all parts" in capsys.readouterr().err

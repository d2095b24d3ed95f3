import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lckv_megatron.commands.train_tokenizer import TokenizerTraining, main, train
from megatron_ext.data.sources import find_sources
from megatron_ext.data.tokenizers import load_tokenizer
from tests.lckv.tokenizer_json import TEXTS
from tests.megatron_ext.data.builders import train_sentencepiece


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(*arguments: str) -> int:
    return main(["--output", "tokenizer.model", "--vocab-size", "330", *arguments])


def test_a_tokenizer_like_llamas(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input", "corpus.jsonl") == 0
    tokenizer = load_tokenizer("sentencepiece", "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.eod) == (330, 2)
    assert f"tokenizer.model: 330 tokens, fingerprint {tokenizer.fingerprint}" in capsys.readouterr().out
    for text in (TEXTS[5], "unseen: ñ 漢 🙂", "  spaces\tand\n\n    lines  ", "12345"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("12345")
    assert len(digits) >= 5, "digits are tokens of their own"
    assert len(tokenizer.encode("hello world")) < 11, "words have been learnt"


def test_the_same_input_gives_the_same_model(corpus: Path) -> None:
    sources = tuple(find_sources(["corpus.jsonl"]))
    model = train(TokenizerTraining(sources, 330))
    assert train(TokenizerTraining(sources, 330)) == model
    fingerprints = set()
    for threads in (1, 4):
        Path("tokenizer.model").write_bytes(train(TokenizerTraining(sources, 330, threads=threads)))
        fingerprints.add(load_tokenizer("sentencepiece", "tokenizer.model").fingerprint)
    assert len(fingerprints) == 1


def test_other_inputs(corpus: Path) -> None:
    Path("packed.jsonl.zst").write_bytes(zstandard.compress(corpus.read_bytes()))
    Path("texts").mkdir()
    for number, text in enumerate(TEXTS):
        Path(f"texts/{number:02d}.txt").write_text(text)
    models = [
        train(TokenizerTraining(tuple(find_sources([path])), 330))
        for path in ("corpus.jsonl", "*.zst", "texts")
    ]
    assert models[0] == models[1] == models[2]


def test_a_sample_of_large_input(tmp_path: Path, corpus: Path) -> None:
    sources = tuple(find_sources(["corpus.jsonl"]))
    size = corpus.stat().st_size
    whole = train(TokenizerTraining(sources, 290, max_bytes=size))
    half = [train(TokenizerTraining(sources, 290, max_bytes=size // 2, seed=seed)) for seed in (1, 1, 2)]
    assert half[0] == half[1]
    assert len({whole, half[0], half[2]}) == 3


def test_lines_of_any_length_are_learnt_from(corpus: Path) -> None:
    Path("long.jsonl").write_text(json.dumps({"text": "abc def " * 20_000}))
    sources = tuple(find_sources(["long.jsonl"]))
    Path("tokenizer.model").write_bytes(train(TokenizerTraining(sources, 272)))
    assert len(load_tokenizer("sentencepiece", "tokenizer.model").encode("abc def")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl"], "input 'none.jsonl' stands for no file"),
        (
            ["--input", "corpus.jsonl", "--vocab-size", "100"],
            "no tokenizer of --vocab-size=100 can be trained",
        ),
        (
            ["--input", "corpus.jsonl", "--vocab-size", "9000"],
            "no tokenizer of --vocab-size=9000 can be trained",
        ),
        (["--input", "corpus.jsonl", "--json-key", "body"], "corpus.jsonl:1: no key 'body'"),
        (["--input", "empty.jsonl"], "no text in the input: all documents are empty"),
    ],
)
def test_bad_input(
    corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_text('{"text": ""}\n')
    assert main(["--vocab-size", "330", "--output", "tokenizer.model", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not Path("tokenizer.model").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lckv-megatron train-tokenizer --input corpus.jsonl --vocab-size 8192" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["corpus.jsonl", "./corpus.jsonl", "link", "other.model", "empty.model"])
def test_only_its_own_models_are_replaced(
    corpus: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to(corpus)
    train_sentencepiece(Path("other.model"))
    Path("empty.model").touch()
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert run("--input", "corpus.jsonl", "--output", output) == 2
    message = (
        "would replace an input"
        if output in ("link",) or "corpus" in output
        else "was not made by this program"
    )
    assert (
        f"--output {Path(output)} {'is there already and ' * ('was' in message)}{message}"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_its_own_model_is_replaced(corpus: Path) -> None:
    for _ in range(2):
        assert run("--input", "corpus.jsonl") == 0


def test_parquet_and_files_without_a_telling_name(corpus: Path) -> None:
    Path("folder").mkdir()
    Path("folder/wiki_00").write_bytes(corpus.read_bytes())
    pq.write_table(pa.table({"text": TEXTS}), "texts.parquet")
    models = [
        train(TokenizerTraining(tuple(find_sources([path])), 330))
        for path in ("corpus.jsonl", "folder", "texts.parquet")
    ]
    assert models[0] == models[1] == models[2]

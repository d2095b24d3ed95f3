import json
import platform
import sysconfig
from pathlib import Path

import pytest

from lckv_megatron.commands import preprocess
from lckv_megatron.commands.demo_corpus import main
from megatron_ext.data.description import read_manifest
from tests.megatron_ext.data.builders import train_sentencepiece


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def documents_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    assert main(["--output", str(path)]) == 0
    return path


def test_it_is_the_standard_library_and_its_documentation(corpus: Path) -> None:
    texts = {document["source"]: document["text"] for document in documents_of(corpus)}
    assert sum(map(len, texts.values())) > 5_000_000
    assert texts["json/decoder.py"] == Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text()
    assert "def" in texts["pydoc/for"] or "for" in texts["pydoc/for"]
    assert "math" in " ".join(texts) or "builtin/itertools" in texts
    assert not [
        source for source in texts if "/tests/" in source or source.startswith(("test/", "site-packages"))
    ]
    assert all(text.strip() for text in texts.values())
    home = str(Path.home())
    assert not [source for source in texts if source.startswith("/") or home in source]


def test_its_size_is_stored_beside_it(corpus: Path) -> None:
    size = json.loads(corpus.with_suffix(".json").read_text())
    documents = documents_of(corpus)
    assert size["documents"] == len(documents)
    assert size["text_bytes"] == sum(len(document["text"].encode()) for document in documents)
    assert size["python"] == platform.python_version()


def test_a_small_corpus_is_part_of_the_large_one_and_always_the_same(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        assert main(["--output", str(tmp_path / name), "--max-bytes", "300000"]) == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    small = documents_of(tmp_path / "one.jsonl")
    size = json.loads((tmp_path / "one.json").read_text())
    assert 250_000 < size["text_bytes"] <= 300_000
    everything = [document["source"] for document in documents_of(corpus)]
    places = [everything.index(document["source"]) for document in small]
    assert places == sorted(places)
    assert f"one.jsonl: {len(small)} documents, 0.3 MB of text" in capsys.readouterr().out


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "corpus.txt")]) == 2
    assert "must end with .jsonl" in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "corpus.jsonl"), "--max-bytes", "1"]) == 2
    assert (
        "no document of Python's standard library was found that fits into --max-bytes=1"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_dataset_of_the_same_stem(tmp_path: Path, sentencepiece_model: Path) -> None:
    """The corpus' size and the dataset's description have names of their own."""
    corpus = tmp_path / "corpus.jsonl"
    options = ["--output", str(corpus), "--max-bytes", "300000"]
    assert main(options) == 0
    size = corpus.with_suffix(".json").read_bytes()
    prefix = str(tmp_path / "corpus")
    tokenizer = ["--tokenizer-type", "sentencepiece", "--tokenizer-model", str(sentencepiece_model)]
    for more in ([], ["--overwrite"]):
        assert preprocess.main(["--input", str(corpus), "--output-prefix", prefix, *tokenizer, *more]) == 0
    assert corpus.with_suffix(".json").read_bytes() == size
    assert read_manifest(prefix) is not None
    assert main(options) == 0
    assert read_manifest(prefix) is not None


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.json"])
@pytest.mark.parametrize("content", ['{"text": "mine"}\n', '{"format": 1}', "", "[" * 200_000])
def test_files_of_others_are_not_replaced(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["--output", str(tmp_path / "corpus.jsonl"), "--max-bytes", "300000"]) == 2
    assert f"{name} is there already and was not made by this program" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: content}

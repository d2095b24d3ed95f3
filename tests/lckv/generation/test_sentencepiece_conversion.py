"""The engine splits text as the model file in a folder does."""

from pathlib import Path

import pytest
import sentencepiece

from lckv.errors import ModelError
from lckv.generation.loading import load_tokenizer
from lckv.tokenizer_files import PROBES, is_only_sentencepiece


def train(folder: Path, **options: object) -> Path:
    (folder / "text.txt").write_text("hello world, hello words\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


def test_the_model_files_own_splitting(tmp_path: Path) -> None:
    path = train(
        tmp_path,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    for text in (*PROBES, "  hello"):
        ids = processor.EncodeAsIds(text)
        assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_model_without_an_exact_conversion(tmp_path: Path) -> None:
    train(tmp_path, vocab_size=16, model_type="unigram")
    with pytest.raises(
        ModelError, match=r"tokenizer.model: transformers splits .* otherwise than this file does.*BPE"
    ):
        load_tokenizer(tmp_path)


def test_what_counts_as_such_a_folder(tmp_path: Path) -> None:
    assert not is_only_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert not is_only_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    assert is_only_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not is_only_sentencepiece(tmp_path)

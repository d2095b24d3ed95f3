import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.config import DataConfig
from megatron_ext.data.checks import check_data, find_vocabulary
from megatron_ext.data.description import manifest_path, read_manifest, write_manifest
from megatron_ext.data.tokenizers import load_tokenizer
from tests.megatron_ext.data.builders import EOD, FINGERPRINT, random_chats, write_chats, write_dataset

DOCUMENTS = [[5, 6, 7, EOD], [8, 9, EOD]]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "d", DOCUMENTS)


def problems(prefix: str, vocab_size: int = 1000, **settings: Any) -> str:
    """What is found, as one text; one dataset unless `data_path` says otherwise."""
    return "\n".join(check_data(DataConfig(**({"data_path": (prefix,)} | settings)), vocab_size))


def change_manifest(prefix: str, **values: Any) -> None:
    path = manifest_path(prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_good_data(prefix: str) -> None:
    assert problems(prefix) == ""
    assert problems(prefix, reset_attention_mask=True, eod_mask_loss=True) == ""
    assert check_data(DataConfig(mock=True), 1000) == []


def test_datasets_of_the_other_kind(prefix: str, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats", random_chats(5))
    assert problems(chats, format="chat") == ""
    assert (
        f"dataset {chats} holds conversations, but data.format is pretraining. Set data.format to chat"
    ) in problems(chats)
    assert (
        f"dataset {prefix} holds texts, but data.format is chat. Set data.format to pretraining, or make the "
        "dataset with lckv-megatron preprocess --data-format chat."
    ) in problems(prefix, format="chat")
    blended = problems(prefix, format="chat", data_path=(prefix, chats))
    assert blended.startswith(f"dataset {prefix} holds texts")
    manifest_path(chats).unlink()
    assert "; negative ones are those of conversations that are not learned." in problems(chats)
    assert (
        f"chats.dataset.json not found, which says that {chats} holds conversations, as data.format is chat. "
    ) in problems(chats, format="chat")


def test_files(prefix: str, tmp_path: Path) -> None:
    index = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").unlink()
    assert "d.idx not found" in problems(prefix)
    Path(f"{prefix}.idx").write_bytes(index)
    with Path(f"{prefix}.bin").open("ab") as file:
        file.truncate(4)
    assert "d.bin: 4 bytes, but d.idx calls for 14; it is truncated" in problems(prefix)
    assert "holds no token" in problems(write_dataset(tmp_path / "empty", []))


def test_all_problems_are_found_at_once(prefix: str, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [[2000, EOD]], vocab_size=3000)
    Path(f"{prefix}.bin").write_bytes(b"")
    found = problems(prefix, data_path=(prefix, str(tmp_path / "none"), other)).split("\n")
    assert len(found) == 4
    for text, line in zip(
        ("d.bin: 0 bytes", "none.idx not found", "another tokenizer", "the token 2000"), found, strict=True
    ):
        assert text in line


def test_settings(prefix: str) -> None:
    assert "both given" in problems(prefix, train_data_path=("x",))
    assert "data.mock=true and data.data_path are both given" in problems(prefix, mock=True)
    assert problems(prefix, data_path=("0", prefix), split="x").count("\n") == 1


def test_a_manifest_of_other_files(prefix: str) -> None:
    change_manifest(prefix, tokens=6)
    found = problems(prefix)
    assert (
        "d.dataset.json describes 2 documents with 6 tokens (uint16), but the index has 2 with 7 (uint16)"
        in found
    )
    manifest_path(prefix).write_text("{")
    assert "d.dataset.json: not a dataset description" in problems(prefix)


def test_another_tokenizer(tmp_path: Path, sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer("sentencepiece", str(sentencepiece_model))
    settings = {"tokenizer_type": "sentencepiece", "tokenizer_model": str(sentencepiece_model)}
    prefix = write_dataset(tmp_path / "d", DOCUMENTS, vocab_size=320, fingerprint=tokenizer.fingerprint)
    change_manifest(prefix, eod=2)
    assert problems(prefix, 320, **settings) == ""
    change_manifest(prefix, eod=3)
    assert f"than data.tokenizer_model={sentencepiece_model}: eod 3 instead of 2. Use the" in problems(
        prefix, 320, **settings
    )
    change_manifest(prefix, eod=2, tokenizer_fingerprint=FINGERPRINT, vocab_size=300)
    found = problems(prefix, 320, **settings)
    assert (
        f"fingerprint {FINGERPRINT} instead of {tokenizer.fingerprint}, vocab_size 300 instead of 320"
        in found
    )
    missing = problems(prefix, 320, tokenizer_type="sentencepiece", tokenizer_model=str(tmp_path / "none"))
    assert "does not exist" in missing


def test_datasets_of_different_tokenizers(prefix: str, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", DOCUMENTS, fingerprint="f" * 16)
    told = problems(prefix, data_path=(prefix, other))
    origin = f"{prefix}.dataset.json"
    assert f"dataset {other} was made with another tokenizer than {origin}: fingerprint {'f' * 16} " in told


def test_datasets_of_one_vocabulary_split_otherwise(prefix: str, tmp_path: Path) -> None:
    """Where both say how; earlier versions did not."""
    other = write_dataset(tmp_path / "other", DOCUMENTS)
    for ours, theirs in (("", "b" * 16), ("a" * 16, "b" * 16)):
        for name, splitting in ((prefix, ours), (other, theirs)):
            manifest = read_manifest(name)
            assert manifest is not None
            write_manifest(name, replace(manifest, tokenizer_splitting=splitting))
        told = problems(prefix, data_path=(prefix, other))
        assert (f"splitting {'b' * 16} instead of {'a' * 16}" in told) == bool(ours)


def test_tokens_outside_the_vocabulary(prefix: str) -> None:
    assert "d.bin holds the token 9, but the vocabulary has 9. Set model.vocab_size" in problems(prefix, 9)
    assert "model.vocab_size=10 is smaller than the vocabulary of dataset" in problems(prefix, 10)
    manifest_path(prefix).unlink()
    assert problems(prefix, 10) == ""
    assert "d.bin holds the token 9, but the vocabulary has 9. Set model.vocab_size" in problems(prefix, 9)


def test_without_a_manifest_it_is_said_that_the_tokenizer_is_unchecked(
    prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest_path(prefix).unlink()
    with caplog.at_level(logging.WARNING):
        assert problems(prefix) == ""
    assert (
        "d.dataset.json not found: whether the tokenizer is the one that made the dataset is not checked"
        in caplog.text
    )


@pytest.mark.parametrize("setting", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_documents_without_an_end(tmp_path: Path, sentencepiece_model: Path, setting: str) -> None:
    tokenizer = {"tokenizer_type": "sentencepiece", "tokenizer_model": str(sentencepiece_model)}
    unknown = write_dataset(tmp_path / "unknown", DOCUMENTS, manifest=False)
    assert f"data.{setting}=true needs to know the end-of-document token" in problems(
        unknown, **{setting: True}
    )
    assert f"data.{setting}=true would do nothing" in problems(unknown, **tokenizer, **{setting: True})
    ended = write_dataset(tmp_path / "ended", [[5, 6, 2]], manifest=False)
    assert problems(ended, **tokenizer, **{setting: True}) == ""
    without = write_dataset(tmp_path / "without", DOCUMENTS, append_eod=False)
    found = problems(without, **{setting: True})
    assert (
        f"data.{setting}=true would do nothing: the documents of {without} have no end-of-document token"
        in found
    )


def test_the_whole_of_a_large_dataset_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ext.data.checks._PROBE_TOKENS", 10)
    monkeypatch.setattr("megatron_ext.data.checks._PROBES", 4)
    for bad, found in ((0, True), (30, True), (99, True), (15, False)):
        tokens = np.ones(100, int)
        tokens[bad] = 999
        prefix = write_dataset(tmp_path / "d", [tokens.tolist()], manifest=False)
        assert bool(problems(prefix, 100)) == found


def test_where_the_vocabulary_is_known_from(prefix: str, tmp_path: Path, sentencepiece_model: Path) -> None:
    data = DataConfig(data_path=(prefix,))
    vocabulary = find_vocabulary(data)
    assert vocabulary is not None
    assert (vocabulary.size, vocabulary.eod, vocabulary.fingerprint) == (1000, EOD, FINGERPRINT)
    named = find_vocabulary(
        replace(
            data,
            tokenizer_type="sentencepiece",
            tokenizer_model=str(sentencepiece_model),
            data_path=("none",),
        )
    )
    assert named is not None
    assert (named.size, named.eod) == (320, 2)
    assert find_vocabulary(DataConfig(mock=True)) is None
    other = write_dataset(tmp_path / "other", DOCUMENTS, vocab_size=2000)
    assert find_vocabulary(replace(data, data_path=(prefix, other))) is None
    assert read_manifest(other) is not None
    manifest_path(other).unlink()
    assert find_vocabulary(replace(data, data_path=(prefix, other))) is None

"""Tokenizer files: the ids are those that the model was trained on."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.tokenizer import has_tokenizer, kind_of, write_tokenizer
from lckv.generation import sentencepiece_conversion
from lckv.generation.loading import load_tokenizer as load_folder
from lckv.tokenizer_files import PROBES
from megatron_ext.data.tokenizers import Tokenizer, load_tokenizer
from tests.lckv.tokenizer_json import write_tokenizer_json
from tests.megatron_ext.data.builders import train_sentencepiece, write_ranks

TEXTS = st.text(st.sampled_from(" \n\tworldhelcumnt<s>/é漢🙂▁0x1"), max_size=40)
MAKERS = {"sentencepiece": train_sentencepiece, "tiktoken": write_ranks, "huggingface": write_tokenizer_json}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer, Path]]:
    """By kind: the original, what was written as loaded again, and where it lies."""
    found = {}
    for kind, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(kind)
        path = make(folder / ("tokenizer.json" if kind == "huggingface" else "vocabulary.model"))
        output = folder / "written"
        output.mkdir()
        assert write_tokenizer(kind_of(path), path, output) == ["tokenizer.json", "tokenizer_config.json"]
        found[kind] = load_tokenizer(kind, str(path)), load_tokenizer("huggingface", str(output)), output
    return found


@pytest.mark.parametrize("kind", MAKERS)
def test_vocabulary_and_end_of_document_stay(
    kind: str, pairs: dict[str, tuple[Tokenizer, Tokenizer, Path]]
) -> None:
    original, written, folder = pairs[kind]
    assert (written.vocab_size, written.eod) == (original.vocab_size, original.eod)
    assert has_tokenizer(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == original.eod


@pytest.mark.parametrize("kind", MAKERS)
@given(text=TEXTS)
def test_ids_and_text_stay(kind: str, text: str, pairs: dict[str, tuple[Tokenizer, Tokenizer, Path]]) -> None:
    original, written, _ = pairs[kind]
    ids = original.encode(text)
    assert written.encode(text) == ids
    if (
        kind != "tiktoken"
    ):  # its decoder, like ours, replaces halves of characters, each library in its own way
        assert written.decode(ids) == original.decode(ids)


def test_chat_templates_are_copied(
    pairs: dict[str, tuple[Tokenizer, Tokenizer, Path]], tmp_path: Path
) -> None:
    """Of every kind that transformers knows: in one file, in JSON, with names."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(pairs["huggingface"][2], source)
    target.mkdir()
    templates = ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"]
    (source / "additional_chat_templates").mkdir()
    for name in templates:
        (source / name).write_text("{{ messages }}" if name.endswith("jinja") else '{"chat_template": "x"}')
    assert set(templates) < set(write_tokenizer("huggingface", source, target))
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in templates)
    assert "tool_use" in AutoTokenizer.from_pretrained(target).chat_template


def test_a_folder_is_copied(pairs: dict[str, tuple[Tokenizer, Tokenizer, Path]], tmp_path: Path) -> None:
    _, written, folder = pairs["sentencepiece"]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_text("no tokenizer")
    names = write_tokenizer(kind_of(folder), folder, tmp_path)
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert load_tokenizer("huggingface", str(tmp_path)).fingerprint == written.fingerprint


def test_wrong_merges_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train_sentencepiece(tmp_path / "vocabulary.model")
    monkeypatch.setattr(sentencepiece_conversion, "_merges", lambda scored: iter(()))
    with pytest.raises(
        ConversionError, match=r"gives .* for 'The quick .*', but exported, transformers makes .* of it"
    ):
        write_tokenizer("sentencepiece", path, tmp_path)


def test_a_type_of_model_with_a_tokenizer_of_its_own(
    pairs: dict[str, tuple[Tokenizer, Tokenizer, Path]], tmp_path: Path
) -> None:
    """transformers puts Qwen2's way of splitting text in place of the one in tokenizer.json."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConversionError, match="Export under another --family, such as lckv-llama"):
        write_tokenizer("huggingface", pairs["sentencepiece"][2], tmp_path)


def test_what_cannot_be_loaded_is_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.json").write_text("of another program")
    assert write_tokenizer("huggingface", source, target) == ["tokenizer.json"]
    assert "the tokenizer is copied as it is, and was not tried" in caplog.text


def test_normalisation_cannot_be_exported(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("hello world\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "nfkc"),
        model_type="bpe",
        vocab_size=16,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ConversionError, match="only models that keep the text as it is can be converted"):
        write_tokenizer("sentencepiece", tmp_path / "nfkc.model", tmp_path)


def test_unigram_models_cannot_be_exported(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("hello world\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "unigram"), vocab_size=16,
        model_type="unigram", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ConversionError, match="is no BPE model"):
        write_tokenizer("sentencepiece", tmp_path / "unigram.model", tmp_path)


SETTINGS = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "chat_template": "{{ messages }}"}
ADDED = {
    "content": "<pad>",
    "special": True,
    "normalized": False,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}


@pytest.mark.parametrize("settings", [None, SETTINGS, {**SETTINGS, "added_tokens_decoder": {"320": ADDED}}])
def test_a_model_file_alone_splits_its_own_way_everywhere(
    tmp_path: Path, settings: dict[str, object] | None
) -> None:
    """In training, in the engine, exported to a folder, and read there by transformers itself."""
    folder, target = tmp_path / "folder", tmp_path / "target"
    folder.mkdir()
    target.mkdir()
    model = load_tokenizer("sentencepiece", str(train_sentencepiece(folder / "tokenizer.model")))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_tokenizer("huggingface", folder, target)
    training = load_tokenizer("huggingface", str(folder))
    engine, exported = load_folder(folder), AutoTokenizer.from_pretrained(target)
    assert engine is not None
    for text in (*PROBES, " a", "   three\n", "a </s> b"):
        ids = model.encode(text)
        assert training.encode(text) == ids
        for tokenizer in (engine, exported):
            assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
    assert training.splitting == model.splitting
    assert training.eod == engine.eos_token_id == exported.eos_token_id == 2
    assert (training.fingerprint == model.fingerprint) == (training.vocab_size == 320)
    if settings is not None:
        assert engine.chat_template == exported.chat_template == "{{ messages }}"
    if settings is not None and "added_tokens_decoder" in settings:
        assert training.decode([*model.encode("hello"), 320]) == "hello<pad>"
        assert engine.convert_tokens_to_ids("<pad>") == exported.convert_tokens_to_ids("<pad>") == 320


def test_a_model_file_that_transformers_splits_otherwise_is_refused(tmp_path: Path) -> None:
    """Where no exact conversion is known."""
    import sentencepiece

    (tmp_path / "text.txt").write_text("hello world\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=16,
        model_type="unigram", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "target").mkdir()
    with pytest.raises(ConversionError, match="transformers splits"):
        write_tokenizer("huggingface", tmp_path, tmp_path / "target")

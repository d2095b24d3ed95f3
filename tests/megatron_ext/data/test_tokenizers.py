import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import DataConfig
from megatron_ext.data.tokenizers import KINDS, Tokenizer, content_of, load_tokenizer
from megatron_ext.errors import ConfigError
from tests.lckv.tokenizer_json import write_tokenizer_json
from tests.megatron_ext.data.builders import train_sentencepiece, write_ranks

SPECIAL_TEXT = "a </s> <|endoftext|> <|end_of_text|> <|begin_of_text|> b"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizers")
    json_file = write_tokenizer_json(folder / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=str(json_file), eos_token="<|endoftext|>").save_pretrained(
        folder / "saved"
    )
    return {
        "sentencepiece": load_tokenizer(
            "sentencepiece", str(train_sentencepiece(folder / "tokenizer.model"))
        ),
        "json": load_tokenizer("huggingface", str(json_file)),
        "directory": load_tokenizer("huggingface", str(folder / "saved")),
        "tiktoken": load_tokenizer("tiktoken", str(write_ranks(folder / "ranks.tiktoken"))),
    }


def test_the_kinds_are_those_of_the_configuration() -> None:
    assert {*KINDS, "none"} == set(get_args(DataConfig.__annotations__["tokenizer_type"]))


@pytest.mark.parametrize("name", ["sentencepiece", "json", "directory", "tiktoken"])
def test_text_survives_and_ids_are_in_range(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]

    @given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁\0"), max_size=40))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.decode(ids) == text

    check()


@pytest.mark.parametrize("name", ["sentencepiece", "json", "directory", "tiktoken"])
def test_no_text_becomes_a_control_token(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(SPECIAL_TEXT)
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == SPECIAL_TEXT


def test_sizes_and_ends_of_documents(tokenizers: dict[str, Tokenizer]) -> None:
    assert (tokenizers["sentencepiece"].vocab_size, tokenizers["sentencepiece"].eod) == (320, 2)
    assert (tokenizers["json"].vocab_size, tokenizers["json"].eod) == (300, 0)
    assert (tokenizers["tiktoken"].vocab_size, tokenizers["tiktoken"].eod) == (259 + 256, 259 + 1)
    assert (
        tokenizers["tiktoken"].decode([259, 259 + 6, 259 + 9])
        == "<|begin_of_text|><|start_header_id|><|eot_id|>"
    )


def test_a_fingerprint_identifies_the_vocabulary(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert tokenizers["json"].fingerprint == tokenizers["directory"].fingerprint
    assert len({tokenizer.fingerprint for tokenizer in tokenizers.values()}) == 3
    other = load_tokenizer(
        "sentencepiece", str(train_sentencepiece(tmp_path / "other.model", vocab_size=321))
    )
    assert other.fingerprint != tokenizers["sentencepiece"].fingerprint


def test_tiktoken_takes_long_runs_of_white_space(tokenizers: dict[str, Tokenizer]) -> None:
    text = " " * 1_000_000
    assert tokenizers["tiktoken"].decode(tokenizers["tiktoken"].encode(text)) == text


def test_a_json_file_takes_its_end_of_document_from_the_file_beside_it(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json", special=("<|endoftext|>", "[STOP]"))
    assert load_tokenizer("huggingface", str(tmp_path)).eod == 0
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "[STOP]"}}')
    assert load_tokenizer("huggingface", str(tmp_path)).eod == 1


def test_bad_paths_and_kinds(tmp_path: Path) -> None:
    text = tmp_path / "text.model"
    text.write_text("no tokenizer\n")
    for kind, path, message in (
        ("bpe", "x", "tokenizer_type='bpe' is unknown; use one of huggingface, sentencepiece, tiktoken"),
        ("tiktoken", None, "needs tokenizer_model"),
        ("sentencepiece", str(tmp_path / "none.model"), "none.model' does not exist"),
        ("sentencepiece", str(tmp_path), "is a directory, but"),
        ("sentencepiece", str(text), "not a readable sentencepiece tokenizer"),
        ("huggingface", str(text), "not a readable huggingface tokenizer"),
        ("huggingface", str(tmp_path), "not a readable huggingface tokenizer"),
        ("tiktoken", str(text), "line 1 is not 'base64-token rank'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(kind, path)


def test_incomplete_ranks(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "ranks.tiktoken")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:100]))
    with pytest.raises(ConfigError, match="byte 100 has no rank of its own"):
        load_tokenizer("tiktoken", str(path))
    path.write_bytes(b"".join(lines[:-2] + lines[-1:]))
    with pytest.raises(ConfigError, match="without gaps"):
        load_tokenizer("tiktoken", str(path))


def test_a_vocabulary_without_an_end_of_document(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json", special=("[PAD]",))
    with pytest.raises(ConfigError, match="names no end-of-document token"):
        load_tokenizer("huggingface", str(tmp_path / "tokenizer.json"))


def edited(folder: Path, name: str, change: dict[str, object]) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


BROKEN = {
    "a model of a newer kind": lambda f: edited(f, "tokenizer.json", {"model": {"type": "Newer"}}),
    "a newer version": lambda f: edited(f, "tokenizer.json", {"version": "9.0"}),
    "no vocabulary": lambda f: edited(
        f, "tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    ),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "another value": lambda f: (f / "tokenizer.json").write_text("[]"),
    "nested too deep": lambda f: (f / "tokenizer.json").write_text("[" * 100_000),
    "cut short": lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:500]),
    "settings of another kind": lambda f: (f / "tokenizer_config.json").write_text("[]"),
    "settings nested too deep": lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("bare", [False, True])
def test_broken_and_newer_folders(tmp_path: Path, what: str, bare: bool) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    assert load_tokenizer("huggingface", str(tmp_path)).eod == 0
    BROKEN[what](tmp_path)
    if bare:
        settings.unlink()
    if bare and what.startswith("settings"):
        assert load_tokenizer("huggingface", str(tmp_path)).eod == 0
        return
    with pytest.raises(ConfigError, match=r"is not a readable huggingface tokenizer \(.*check the file"):
        load_tokenizer("huggingface", str(tmp_path))


def test_a_newer_file_is_said_to_be_newer(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    edited(tmp_path, "tokenizer.json", {"model": {"type": "Newer"}})
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match=r"untagged enum .*; broken, or newer than tokenizers \d+\."):
            load_tokenizer("huggingface", str(path))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_damaged_special_tokens(tmp_path: Path, content: str) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens_map.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"special_tokens_map.json' is not a readable huggingface tokenizer"
    ):
        load_tokenizer("huggingface", str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no model", b"\0" * 100])
def test_a_folder_with_a_damaged_model_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a readable huggingface tokenizer"):
        load_tokenizer("huggingface", str(tmp_path))


def test_a_folder_with_only_ranks(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    assert (
        load_tokenizer("huggingface", str(tmp_path)).splitting
        == load_tokenizer("tiktoken", str(path)).splitting
    )


def test_splitting_and_content_tell_what_a_fingerprint_does_not(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path / "tokenizer.json")
    before = load_tokenizer("huggingface", str(tmp_path))
    content = content_of(str(tmp_path))
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    after = load_tokenizer("huggingface", str(tmp_path))
    assert after.fingerprint == before.fingerprint
    assert after.splitting != before.splitting
    assert content_of(str(tmp_path)) != content != content_of(str(tmp_path / "tokenizer.json"))

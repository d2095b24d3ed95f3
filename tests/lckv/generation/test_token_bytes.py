"""The bytes of tokens: together they are the text, of every kind of tokenizer."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lckv.generation.token_bytes import TokenBytes
from tests.lckv.generation.tokenizers import byte_level, with_byte_fallback


def metaspace() -> PreTrainedTokenizerFast:
    """Pieces in which a space is written as a sign, with one put before the text."""
    pieces = ["<end>", *"▁abcdefghij", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False
    )


def words() -> PreTrainedTokenizerFast:
    """Of a kind whose rules are not known here."""
    made = tokenizers.Tokenizer(models.WordPiece({"<end>": 0, "ab": 1, "##cd": 2, "e": 3}, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False
    )


TOKENIZERS = {
    "byte_level": byte_level(),
    "with_byte_fallback": with_byte_fallback(),
    "metaspace": metaspace(),
}
for _tokenizer in TOKENIZERS.values():
    _tokenizer.add_tokens([AddedToken("<think>"), AddedToken("<|é|>")])
TABLES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
ALPHABETS = {"byte_level": "ab the é€😀 \n", "with_byte_fallback": "ab the é€😀 \n", "metaspace": "abc  def"}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_bytes_of_all_tokens_are_the_text(name: str, data: st.DataObject) -> None:
    tokenizer, table = TOKENIZERS[name], TABLES[name]
    texts = st.text(st.sampled_from(ALPHABETS[name]), max_size=20)
    text = data.draw(texts) + data.draw(st.sampled_from(["", "<think>", "<|é|>"])) + data.draw(texts)
    tokens = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    assert table.begins_text(tokens[:1]) and not table.begins_text([*tokens, 1])
    joined = b"".join(table.bytes_of(token, first=number == 1) or b"" for number, token in enumerate(tokens))
    assert joined.decode("utf-8", "replace") == tokenizer.decode(tokens, skip_special_tokens=True)


def test_parts_of_characters_and_spaces_have_names_of_their_own() -> None:
    bytes_as_letters, pieces = TokenBytes(byte_level()), TokenBytes(with_byte_fallback())
    euro = byte_level().encode("€", add_special_tokens=False)
    assert [bytes_as_letters.text_of(token) for token in euro] == [
        "bytes:\\xe2",
        "bytes:\\x82",
        "bytes:\\xac",
    ]
    space = with_byte_fallback().convert_tokens_to_ids("▁a")
    assert (pieces.text_of(space), pieces.bytes_of(space)) == (" a", b" a")
    assert pieces.bytes_of(space, first=True) == b"a"
    letter, byte = with_byte_fallback().convert_tokens_to_ids(["a", "<0x61>"])
    assert pieces.bytes_of(letter) == pieces.bytes_of(byte) == b"a"


def test_special_tokens_have_a_name_and_no_bytes() -> None:
    table = TokenBytes(byte_level())
    assert (table.text_of(0), table.bytes_of(0)) == ("<end>", None)


def test_tokens_beyond_the_vocabulary_are_empty() -> None:
    table = TokenBytes(byte_level())
    assert (table.text_of(99_999), table.bytes_of(99_999)) == ("", b"")


def test_a_decoder_with_other_rules_is_asked() -> None:
    tokenizer = words()
    table = TokenBytes(tokenizer)
    tokens = tokenizer.convert_tokens_to_ids(["ab", "##cd", "e"])
    assert [table.bytes_of(token) for token in tokens] == [b" ab", b"cd", b" e"]
    assert table.bytes_of(tokens[0], first=True) == b"ab"

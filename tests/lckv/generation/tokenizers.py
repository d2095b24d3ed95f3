"""Tokenizers made on the spot, of the two kinds that there are: bytes as characters, and pieces with bytes to
fall back on."""

import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def byte_level(*, merges: tuple[tuple[str, str], ...] = (("t", "h"), ("th", "e"))) -> PreTrainedTokenizerFast:
    """As GPT-2: every byte is a token, and a few are merged; token 0 is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: number for number, letter in enumerate(letters, 1)}
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    made = tokenizers.Tokenizer(BPE(vocabulary, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False
    )


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: pieces in which a space is written as a sign, and bytes for characters that are in none."""
    pieces = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij", "ab", "▁a", "▁b"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "b")]
    made = tokenizers.Tokenizer(
        BPE({piece: number for number, piece in enumerate(pieces)}, merges, byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False
    )

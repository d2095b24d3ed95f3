"""What the files of a tokenizer are, and what two tokenizers are compared on."""

from pathlib import Path

MODEL_NAME = "tokenizer.model"

PROBES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two spaces,\n\n\ta tab, and more   \n        than   four     ",
    "def f(x: int) -> str:\n    return f'{x:>12}'  # comment\n",
    "naïve café — “quotes”, Ελληνικά, русский, 漢字かな, 한국어, 🙂👍🏽, \u200b\u00a0",
    " ",
    "\r\n",
    "<s>text</s> <unk><0x0A> <|end_of_text|>",
)
"""Texts that two tokenizers with the same vocabulary must split alike to be the same."""


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins like one of tiktoken's, with "base64-token rank"."""
    with path.open("rb") as file:
        first = file.readline(200).split()
    return len(first) == 2 and first[1].isdigit()


def is_only_sentencepiece(folder: Path) -> bool:
    """Whether a SentencePiece model, tokenizer.model, is the only vocabulary in a folder."""
    path = folder / MODEL_NAME
    return path.is_file() and not (folder / "tokenizer.json").exists() and not is_tiktoken(path)

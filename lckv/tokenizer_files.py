"""What the files of a tokenizer are, and what two tokenizers are compared on."""

from pathlib import Path

from lckv.errors import ModelError
from lckv.plain_files import MAX_BYTES, odd_entries, open_plain, plain_size
from lckv.weights.json_file import read_json_object

MODEL_NAME = "tokenizer.model"
JSON_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_OTHER_NAMES = (
    MODEL_NAME,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
)

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
    with open_plain(path) as file:
        first = file.readline(200).split()
    return len(first) == 2 and first[1].isdigit()


def check_folder(folder: Path) -> None:
    """Looks at the files of a folder that libraries are going to read, who do not expect the worst.

    Raises ModelError that names the file where one is no file, too large, or no JSON object but has the name
    of one.
    """
    problems = odd_entries(folder)
    if problems:
        raise ModelError("\n".join(problems))
    for path in (folder / name for name in (*JSON_NAMES, *_OTHER_NAMES)):
        if path.is_file() and plain_size(path) > MAX_BYTES:
            raise ModelError(f"{path} has {plain_size(path):,} bytes; a file of a tokenizer has fewer.")
    for name in JSON_NAMES:
        if (folder / name).exists():
            read_json_object(folder / name)


def is_only_sentencepiece(folder: Path) -> bool:
    """Whether a SentencePiece model, tokenizer.model, is the only vocabulary in a folder."""
    path = folder / MODEL_NAME
    return path.is_file() and not (folder / "tokenizer.json").exists() and not is_tiktoken(path)

"""Writes a tokenizer of words, rows of filler that hide needles, and questions about needles.

python examples/long_context_toy/haystacks.py FOLDER [ROWSxTOKENS ...]

A needle is `keep KEY VALUE .`, a question `find KEY`, and its answer VALUE. Every word is a token. In FOLDER:
tokenizer/, TOKENS.jsonl (rows to train on, of each length) and questions.jsonl (prompts of three lengths, the
last that of the longest rows; all of one length have one haystack, and so have those of its control, in which
there are no needles).
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, NEEDLE, QUESTION, STOP = "<end>", "keep", "find", "."
FILLER = [
    "the", "grass", "is", "green", STOP, "the", "sky", "is", "blue", STOP, "the", "sun", "is", "yellow", STOP,
    "here", "we", "go", STOP, "there", "and", "back", "again", STOP,
]  # fmt: skip
"""A passage that comes again and again."""
KEYS = [first + second for first in ("ba", "de", "fi", "go") for second in ("no", "pu", "ra", "se")]
VALUES = [str(number) for number in range(16)]
ROWS = ("4096x64", "256x512", "128x4096", "8x65536")
"""To train on."""
SENTENCE = 4
"""Tokens of a needle, and of a question with its answer."""
NO_FILLER = 100
"""Rows of fewer tokens are needles and questions."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NEEDLES_AT_A_DEPTH = 3


def save_tokenizer(folder: Path) -> None:
    """A Hugging Face folder with a token for each word."""
    words = dict.fromkeys([END, NEEDLE, QUESTION, *FILLER, *KEYS, *VALUES])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(str(folder))


def filler_from(source: random.Random, count: int) -> list[str]:
    """So many words of the passage, from any of them on."""
    start = source.randrange(len(FILLER))
    return [FILLER[(start + index) % len(FILLER)] for index in range(count)]


def within(filler: Sequence[str], sentences: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
    """The filler with each sentence in front of the word whose number comes with it."""
    words: list[str] = []
    done = 0
    for place, sentence in sorted(sentences, key=lambda entry: entry[0]):
        words += [*filler[done:place], *sentence]
        done = place
    return [*words, *filler[done:]]


def row(source: random.Random, length: int) -> str:
    """`length` tokens with the end: needles anywhere in the first half of the filler, and questions about any
    of them anywhere in the rest. Questions are many, so that there is much to learn from a row: of long ones
    every tenth token is an answer, short ones have hardly any filler."""
    sentences = (length - 1) // SENTENCE
    needles = min(len(KEYS), sentences // 3)
    asked = sentences - needles if length < NO_FILLER else length // 10
    hidden = {key: source.choice(VALUES) for key in source.sample(KEYS, needles)}
    filler = filler_from(source, length - 1 - SENTENCE * (needles + asked))
    middle = len(filler) // 2
    placed = [(source.randint(0, middle), [NEEDLE, key, value, STOP]) for key, value in hidden.items()]
    for _ in range(asked):
        key = source.choice([*hidden])
        placed.append((source.randint(middle + 1, len(filler) + 1), [QUESTION, key, hidden[key], STOP]))
    return " ".join(within(filler, placed))


def questions(source: random.Random, length: int) -> list[dict[str, str]]:
    """Prompts that have `length` tokens together with the answer. The id says length, depth, answer, and
    whether the haystack has the needles or, as a control, none."""
    keys = source.sample(KEYS, len(DEPTHS) * NEEDLES_AT_A_DEPTH)
    asked = [
        (depth, depth + 0.02 * (source.random() - 0.5), keys.pop(), source.choice(VALUES))
        for depth in DEPTHS
        for _ in range(NEEDLES_AT_A_DEPTH)
    ]
    prompts = []
    for kind, hidden in (("needles", asked), ("control", [])):
        filler = filler_from(source, length - 3 - SENTENCE * len(hidden))  # question, key and answer follow
        placed = [(int(place * len(filler)), [NEEDLE, key, value, STOP]) for _, place, key, value in hidden]
        text = " ".join(within(filler, placed))
        prompts += [
            {"prompt": f"{text} {QUESTION} {key}", "id": f"{length} {depth} {value} {kind}"}
            for depth, _, key, value in asked
        ]
    return prompts


def write(path: Path, objects: Sequence[dict[str, str]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in objects), encoding="utf-8")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Writes rows of filler that hide needles, and questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "rows", nargs="*", default=ROWS, metavar="ROWSxTOKENS",
        help=f"rows to train on (default: {' '.join(ROWS)})",
    )  # fmt: skip
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(1)
    save_tokenizer(options.folder / "tokenizer")
    sizes = [tuple(map(int, rows.split("x"))) for rows in options.rows]
    for rows, length in sizes:
        texts = [{"text": row(source, length)} for _ in range(rows)]
        write(options.folder / f"{length}.jsonl", texts)
    longest = max(length for _, length in sizes)
    prompts = [
        prompt for length in (longest // 16, longest // 4, longest) for prompt in questions(source, length)
    ]
    write(options.folder / "questions.jsonl", prompts)


if __name__ == "__main__":
    main()

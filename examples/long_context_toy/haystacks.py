"""Writes a tokenizer of words, rows of filler that hide needles, and questions about needles.

python examples/long_context_toy/haystacks.py FOLDER     --help shows the sizes

A needle is `keep KEY VALUE .`, a question `find KEY`, and its answer VALUE. Every word is a token. In FOLDER:
tokenizer/, short.jsonl, middle.jsonl and long.jsonl (rows to train on), questions.jsonl
(prompts of three lengths; all of one length have one haystack, and so have those of its control, in which
there are no needles).
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
ROWS = {"short": (8192, 64), "middle": (512, 2048), "long": (8, 65536)}
"""Rows to train on: how many, and their tokens."""
SENTENCE = 4
"""Tokens of a needle, and of a question with its answer."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NEEDLES_AT_A_DEPTH = 3


class Needle(NamedTuple):
    """What is hidden, and where: 0 is the beginning of the haystack, 1 its end."""

    depth: float
    key: str
    value: str


def save_tokenizer(folder: Path) -> None:
    """A Hugging Face folder with a token for each word."""
    words = dict.fromkeys([END, NEEDLE, QUESTION, *FILLER, *KEYS, *VALUES])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(str(folder))


def haystack(source: random.Random, length: int, needles: Sequence[Needle]) -> list[str]:
    """`length` words: filler from any of its words on, and each needle in its place."""
    count = length - SENTENCE * len(needles)
    start = source.randrange(len(FILLER))
    filler = [FILLER[(start + index) % len(FILLER)] for index in range(count)]
    words: list[str] = []
    done = 0
    for needle in sorted(needles):
        place = int(needle.depth * count)
        words += [*filler[done:place], NEEDLE, needle.key, needle.value, STOP]
        done = place
    return words + filler[done:]


def hidden(source: random.Random, count: int) -> list[Needle]:
    """Needles with different keys, anywhere."""
    return [Needle(source.random(), key, source.choice(VALUES)) for key in source.sample(KEYS, count)]


def row(source: random.Random, length: int, count: int, times: int) -> str:
    """`length` tokens with the end: a haystack with `count` needles; then each of them is asked for, in any
    order, and so again, `times` in all."""
    needles = hidden(source, count)
    words = haystack(source, length - 1 - SENTENCE * count * times, needles)
    for _ in range(times):
        for needle in source.sample(needles, count):
            words += [QUESTION, needle.key, needle.value, STOP]
    return " ".join(words)


def questions(source: random.Random, length: int) -> list[dict[str, str]]:
    """Prompts that have `length` tokens together with the answer. The id says length, depth, answer, and
    whether the haystack has the needles or, as a control, none."""
    keys = source.sample(KEYS, len(DEPTHS) * NEEDLES_AT_A_DEPTH)
    asked = [
        (depth, Needle(depth + 0.02 * (source.random() - 0.5), keys.pop(), source.choice(VALUES)))
        for depth in DEPTHS
        for _ in range(NEEDLES_AT_A_DEPTH)
    ]
    prompts = []
    for kind, needles in (("needles", [needle for _, needle in asked]), ("control", [])):
        text = " ".join(haystack(source, length - 3, needles))  # question, key and answer follow
        prompts += [
            {"prompt": f"{text} {QUESTION} {needle.key}", "id": f"{length} {depth} {needle.value} {kind}"}
            for depth, needle in asked
        ]
    return prompts


def write(path: Path, objects: Sequence[dict[str, str]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in objects), encoding="utf-8")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Writes rows of filler that hide needles, and questions.")
    parser.add_argument("folder", type=Path)
    for name, (rows, length) in ROWS.items():
        parser.add_argument(
            f"--{name}", type=int, nargs=2, default=(rows, length), metavar=("ROWS", "TOKENS")
        )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(1)
    save_tokenizer(options.folder / "tokenizer")
    for name in ROWS:
        rows, length = getattr(options, name)
        count, times = (4, 2) if name == "short" else (len(KEYS), 1)
        texts = [{"text": row(source, length, count, times)} for _ in range(rows)]
        write(options.folder / f"{name}.jsonl", texts)
    _, longest = options.long
    lengths = (longest // 16, longest // 4, longest)
    prompts = [prompt for length in lengths for prompt in questions(source, length)]
    write(options.folder / "questions.jsonl", prompts)


if __name__ == "__main__":
    main()

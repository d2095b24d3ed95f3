"""Writes small conversations in which the assistant answers in JSON, and questions that are in none of them.

python examples/sft_smollm2/chats.py FOLDER     writes FOLDER/chats.jsonl and FOLDER/questions.jsonl
"""

import json
import random
import sys
from pathlib import Path

WORDS = [
    "garden", "river", "window", "mountain", "pencil", "bottle", "castle", "engine",
    "forest", "guitar", "harbor", "island", "jacket", "kitchen", "ladder", "market",
    "needle", "orange", "planet", "quarry", "ribbon", "saddle", "tunnel", "velvet",
    "walnut", "yellow", "zipper", "anchor", "basket", "candle",
]  # fmt: skip
CONVERSATIONS, QUESTIONS = 400, 20


def question(source: random.Random) -> tuple[str, object]:
    """A question and its answer."""
    one, other = source.sample(range(2, 100), 2)
    word = source.choice(WORDS)
    return source.choice(
        [
            (f"What is {one} plus {other}?", one + other),
            (f"Which number is larger, {one} or {other}?", max(one, other)),
            (f"Write the word {word} in capital letters.", word.upper()),
            (f"What is the first letter of the word {word}?", word[0]),
            (f"How many words are in this list: {' '.join(source.sample(WORDS, one % 5 + 1))}?", one % 5 + 1),
        ]
    )


def reply(answer: object) -> str:
    """What the assistant is to say."""
    return json.dumps({"answer": answer})


def main(folder: str) -> None:
    """Write both files."""
    source = random.Random(1)
    asked: set[str] = set()
    chats = []
    for _ in range(CONVERSATIONS):
        messages = []
        for _ in range(source.choice((1, 1, 2, 3))):
            text, answer = question(source)
            asked.add(text)
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply(answer)}]
        chats.append({"messages": messages})
    questions: dict[str, str] = {}
    while len(questions) < QUESTIONS:
        text, answer = question(source)
        if text not in asked:
            questions[text] = reply(answer)
    prompts = [
        {"messages": [{"role": "user", "content": text}], "id": said} for text, said in questions.items()
    ]
    for name, lines in (("chats", chats), ("questions", prompts)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (Path(folder) / f"{name}.jsonl").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Losses and answers before and after; 1 where the loss did not fall."""

import json
import sys
from pathlib import Path
from typing import Any

_SHOWN = 4


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_json(text: str) -> bool:
    """Whether an answer has the form that was to be learned."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and value.keys() == {"answer"}


def main(folder: str) -> int:
    """Print what changed."""
    place = Path(folder)
    questions = [prompt["messages"][-1]["content"] for prompt in read(place / "questions.jsonl")]
    for name in ("before", "after"):
        answers = read(place / f"{name}.jsonl")
        texts = [answer["text"].strip() for answer in answers]
        right = sum(text == answer["id"] for text, answer in zip(texts, answers, strict=True))
        print(f"{name:<6}  of {len(texts)} answers {sum(map(is_json, texts))} are JSON, {right} are right")
        for question, text in list(zip(questions, texts, strict=True))[:_SHOWN]:
            print(f"        {question} {text!r}")
    metrics = read(place / "metrics.jsonl")
    falls = True
    for name in ("lm_loss", "validation_loss"):
        losses = [report[name] for report in metrics if name in report]
        print(f"{name:<15}  {losses[0]:.4f} -> {losses[-1]:.4f}")
        falls = falls and losses[-1] < losses[0]
    if not falls:
        print("the loss did not fall", file=sys.stderr)
    return 0 if falls else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

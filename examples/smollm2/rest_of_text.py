"""What a text holds behind the tokens that are measured: `rest_of_text.py MODEL TEXT TOKENS OUTPUT` writes
the lines of TEXT behind its first TOKENS tokens."""

import sys
from pathlib import Path

from transformers import AutoTokenizer


def rest_of(text: str, tokens: int, model: str) -> str:
    """The lines of `text` behind the one in which its first `tokens` tokens end."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= tokens:
        raise ValueError(f"the text has {len(offsets)} tokens; more than {tokens} are needed.")
    return text[text.index("\n", offsets[tokens][1]) + 1 :]


if __name__ == "__main__":
    model, source, count, target = sys.argv[1:]
    Path(target).write_text(rest_of(Path(source).read_text(), int(count), model))

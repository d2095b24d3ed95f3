import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lckv.generation.sampling import SamplingParams
from lckv_megatron.prompts import Prompt, read_batch
from megatron_ext.errors import ConfigError


def read(path: Path, content: str) -> list[Prompt]:
    def tokenizer(text: str) -> Any:
        return SimpleNamespace(input_ids=[*text.encode()])

    path.write_text(content, encoding="utf-8")
    return read_batch(path, tokenizer, SamplingParams(), None)


def test_a_prompt_in_each_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd"  # what other programs take for ends of lines
    lines = [json.dumps({"prompt": text, "id": "x"}, ensure_ascii=False), "", '{"prompt": "b"}\r', ""]
    prompts = read(tmp_path / "b.jsonl", "\ufeff" + "\n".join(lines))
    assert [(prompt.name, prompt.tokens) for prompt in prompts] == [("x", [*text.encode()]), ("3", [98])]


def test_biases_are_of_tokens(tmp_path: Path) -> None:
    (prompt,) = read(tmp_path / "b.jsonl", '{"prompt": "a", "logit_bias": {"5": -100, "0": 1.5}}')
    assert prompt.params.logit_bias == {5: -100, 0: 1.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "id": "\\udfff"}', "half of a surrogate pair"),
        ('{"prompt": "a", "stop": ["\\ud800"]}', "half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ("[" * 100_000, "too deep to be read"),
        ("{", "not valid JSON"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias has the name 'x'; names must be tokens"),
        ('{"prompt": "a", "logit_bias": {"05": 1}}', "logit_bias has the name '05'; names must be tokens"),
        ('{"prompt": "a", "logit_bias": {"5": "1"}}', "logit_bias is {5: '1'}; it must be a map of tokens"),
        ('{"prompt": "a", "logit_bias": [5]}', r"logit_bias is \(5,\); it must be a map of tokens"),
        ("[]", 'an object with either "prompt" or "messages" is needed'),
    ],
)
def test_lines_that_are_no_prompts(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"b\.jsonl:2: .*{message}"):
        read(tmp_path / "b.jsonl", '{"prompt": "a"}\n' + line)

"""Prompts of command-line programs: a text, the lines of a file, chats;
as tokens, each with its sampling settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lckv.generation.penalties import biases_by_token
from lckv.generation.sampling import SamplingParams
from lckv_megatron.unicode_text import check_text
from megatron_ext.errors import ConfigError

_SETTINGS = tuple(field.name for field in fields(SamplingParams) if field.name != "grammar")
"""Those that a line may have; a grammar is one for all lines."""


@dataclass(frozen=True)
class Prompt:
    """What to answer."""

    name: str
    """Its id, or its number in the file from 1 on."""

    tokens: list[int]
    params: SamplingParams


class Chat:
    """Messages as tokens, by a tokenizer's chat template. Raises ConfigError where it has none."""

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "--chat or messages are given, but the model's tokenizer has no chat template; give plain "
                "prompts."
            )
        self._tokenizer = tokenizer
        self._before = [] if system is None else [{"role": "system", "content": system}]

    def tokens(self, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
        """Up to where the answer begins; `where` is named in the ConfigError
        for messages that the template refuses."""
        try:
            encoded = self._tokenizer.apply_chat_template(
                [*self._before, *messages], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # templates are programs of their own: anything can go wrong in them
            raise ConfigError(
                f"{where}: the tokenizer's chat template refuses the messages: {error}"
            ) from error
        return list(encoded["input_ids"])


def single(text: str, tokenizer: Any, params: SamplingParams, chat: Chat | None) -> Prompt:
    """A text, as a message of the user where there is a chat."""
    return Prompt("1", _tokens(text, tokenizer, chat, "--prompt"), params)


def read_batch(path: Path, tokenizer: Any, params: SamplingParams, chat: Chat | None) -> list[Prompt]:
    """One prompt per line of a JSON-lines file: an object with `prompt` (a text) or `messages` (a chat),
    perhaps `id`, and fields of `SamplingParams` that shall differ from `params`. Raises ConfigError naming
    file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--batch {path} cannot be read: {error}") from error
    lines = text.split("\n")  # not at the other ends of lines that a text may hold, such as U+2028
    prompts = [
        _line(f"{path}:{number}", number, line, tokenizer, params, chat)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise ConfigError(f"--batch {path} has no prompts: give one JSON object per line.")
    return prompts


def _line(
    where: str, number: int, line: str, tokenizer: Any, params: SamplingParams, chat: Chat | None
) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({error}).") from error
    except RecursionError:
        raise ConfigError(f"{where}: lists or objects in one another, too deep to be read.") from None
    if not isinstance(content, dict) or ("prompt" in content) == ("messages" in content):
        raise ConfigError(f'{where}: an object with either "prompt" or "messages" is needed.')
    for name, value in content.items():
        check_text(name, f"{where}: a field's name")
        check_text(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), f"{where}: {name}"
        )
    settings = {name: value for name, value in content.items() if name not in ("prompt", "messages", "id")}
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise ConfigError(
            f"{where}: {unknown[0]!r} is no field; known are prompt, messages, id, {', '.join(_SETTINGS)}."
        )
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    if isinstance(values.get("logit_bias"), dict):
        try:
            values["logit_bias"] = biases_by_token(values["logit_bias"])
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    own = replace(params, **values)
    if own.problems():
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in own.problems()))
    name = str(content.get("id", number))
    if "prompt" in content:
        if not isinstance(content["prompt"], str):
            raise ConfigError(f"{where}: prompt is {content['prompt']!r}; it must be a text.")
        return Prompt(name, _tokens(content["prompt"], tokenizer, chat, where), own)
    messages = content["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConfigError(f"{where}: messages must be a list of objects with role and content.")
    return Prompt(name, (chat or Chat(tokenizer)).tokens(messages, where), own)


def _tokens(text: str, tokenizer: Any, chat: Chat | None, where: str) -> list[int]:
    if chat is not None:
        return chat.tokens([{"role": "user", "content": text}], where)
    return list(tokenizer(text).input_ids)

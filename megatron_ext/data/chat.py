"""Conversations as tokens, and which of them a model is to learn: what the assistant says.

The text of a conversation is what the tokenizer's chat template makes of it. The assistant's part of it is
known from the template, where that marks it ({% generation %}), and else from the text itself: what follows
the prompt for an answer, up to the end of the turn.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from lckv.errors import ModelError
from megatron_ext.data.conversations import Messages, texts_within
from megatron_ext.errors import ConfigError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(NamedTuple):
    """A conversation of n tokens."""

    tokens: np.ndarray
    """int64 [n]."""

    learned: np.ndarray
    """bool [n]: tokens that the assistant says, the end of its turn included."""


class BadConversationError(ConfigError):
    """A conversation that the chat template cannot render, or in which nothing can be learned; the message
    says why."""


class ChatTokenizer:
    """The tokenizer of a Hugging Face folder, with its chat template."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where the folder has no tokenizer, no chat template, or one that does not know
        where in a text its tokens are."""
        from lckv.generation.loading import load_tokenizer  # brings torch, which programs without chats spare

        try:
            tokenizer: Any = load_tokenizer(folder)
        except (ModelError, OSError, ValueError) as error:
            raise ConfigError(f"data.tokenizer_model: {folder} cannot be loaded: {error}") from error
        if tokenizer is None:
            raise ConfigError(
                f"data.tokenizer_model: {folder} is no folder with a tokenizer of Hugging Face."
            )
        if not tokenizer.is_fast:
            raise ConfigError(
                f"data.tokenizer_model: {folder} has no tokenizer.json, without which it is not known where "
                "in a text its tokens are; save the tokenizer with transformers' save_pretrained."
            )
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                f"data.tokenizer_model: {folder} has no chat template; put it into chat_template.jinja there."
            ) from error
        tokenizer.model_max_length = 2**62  # or every long conversation is warned of
        self._tokenizer = tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    @property
    def template(self) -> str:
        """16 hexadecimal digits that identify the chat template."""
        return hashlib.sha256(self._template.encode()).hexdigest()[:16]

    def encode(self, messages: Messages, tools: Sequence[Any] | None = None) -> Conversation:
        """The tokens of a conversation; `tools` as the template takes them.

        Raises BadConversationError where the template refuses it, where it has no answer, or where the
        answers cannot be told from the rest.
        """
        if not any(message.get("role") == "assistant" for message in messages):
            raise BadConversationError("no message is the assistant's, so there is nothing to learn.")
        self._check_contents(messages)
        text = self._render(messages, tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # [n, 2]: first character of each token, and the one after its last
        places = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(places), dtype=bool)
        for first, last in self._answers(text, messages, tools):
            learned |= (places[:, 0] >= first) & (places[:, 1] <= last)
        if not learned[1:].any():  # nothing comes before the first token, from which it could be told
            raise BadConversationError("the assistant's messages are empty, so there is nothing to learn.")
        return Conversation(np.array(encoded["input_ids"], dtype=np.int64), learned)

    def _check_contents(self, messages: Messages) -> None:
        """A special token inside of a message would end a turn, or begin another one."""
        if self._special is None:
            return
        texts = ((index, *text) for index, message in enumerate(messages) for text in texts_within(message))
        for index, name, text in texts:
            if match := self._special.search(text):
                raise BadConversationError(
                    f"{name} of message {index} holds the special token {match[0]!r}, which would be taken "
                    "for the end or the beginning of a turn."
                )

    def _answers(
        self, text: str, messages: Messages, tools: Sequence[Any] | None
    ) -> Iterator[tuple[int, int]]:
        """First and last character (exclusive) of what the assistant says."""
        if _MARK.search(self._template):
            yield from self._marked(messages, tools)
            return
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = self._render(messages[:index], tools, add_generation_prompt=True)
            # The line break behind a turn belongs to the next one.
            answered = self._render(messages[: index + 1], tools).rstrip()
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise BadConversationError(
                    f"the chat template writes message {index} in another way when others follow, so that it "
                    "cannot be told what the assistant said. Give a template that marks it with "
                    "{% generation %} ... {% endgeneration %}."
                )
            yield len(prompt), len(answered)

    def _marked(self, messages: Messages, tools: Sequence[Any] | None) -> Iterator[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=cast(Any, [messages]),
            tools=cast(Any, tools),
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        _, places = rendered
        yield from places[0]

    def _render(self, messages: Messages, tools: Sequence[Any] | None, **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._template, tokenize=False, **options
            )
        except Exception as error:  # a template raises whatever it likes
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            raise BadConversationError(f"the chat template refuses it: {reason}") from error

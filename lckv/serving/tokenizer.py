"""The tokenizer as the server uses it: away from the event loop,
one text at a time, apart from the engine's."""

import asyncio
import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lckv.serving.errors import ApiError


class ServedTokenizer:
    """A copy of a Hugging Face tokenizer. Such a tokenizer must not be used by two threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects around it."""
        return await asyncio.to_thread(self._encode, text, add_special_tokens=True)

    async def encode_chat(self, conversation: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template.
        Raises ApiError where there is none, or it refuses."""
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ApiError(
                400, "this model's tokenizer has no chat template; use /v1/completions.", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise ApiError(
                400, f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from error
        return await asyncio.to_thread(self._encode, text, add_special_tokens=False)

    def decode(self, prompt: str | Sequence[int]) -> str:
        """The text of a prompt."""
        if isinstance(prompt, str):
            return prompt
        with self._lock:
            return self._tokenizer.decode(prompt)

    def token_text(self, token: int) -> str:
        """The text of one token, special ones too; of a part of a character its name in the vocabulary, which
        tells it from others."""
        with self._lock:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            return self._tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

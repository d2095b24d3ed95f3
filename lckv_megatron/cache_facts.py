"""What an engine's KV cache cost and saved while a program used it."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lckv_megatron.tables import size

if TYPE_CHECKING:
    from lckv.generation.engine import Engine


class CacheFacts:
    """Numbers of an engine's cache, from looking at it again and again."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._most_pages = 0
        self._slots = self._tokens = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._started

    @property
    def compression_ratio(self) -> float:
        """Tokens per slot, the mean over slots of all that was observed."""
        return self._tokens / self._slots if self._slots else 1.0

    def observe(self, scored_tokens: int = 0) -> None:
        """Look at the cache after a step of the engine, or after so many tokens have been scored."""
        ratio, pages = self._engine.stats().compression_ratio, self._engine.cache.pages_in_use
        slots = scored_tokens / ratio if scored_tokens else max(1, pages)
        self._slots, self._tokens = self._slots + slots, self._tokens + slots * ratio
        self._most_pages = max(self._most_pages, pages)

    def as_dict(self) -> dict[str, Any]:
        """Bytes, pages, and tokens per slot as measured."""
        from lckv.generation.memory import cache_model

        engine, cache = self._engine, self._engine.cache
        ratio = self.compression_ratio
        dtype = str(engine.model.dtype).removeprefix("torch.")
        model = cache_model(engine.model.config, dtype, cache.page_size)
        return {
            "compression_ratio": ratio,
            "kv_bytes_per_token": replace(model, compression_ratio=ratio).bytes_per_token,
            "plain_kv_bytes_per_token": model.plain.bytes_per_token,
            "cache_bytes": cache.num_bytes,
            "page_bytes": cache.bytes_per_page,
            "most_pages_in_use": self._most_pages or None,
        }

    def line(self) -> str:
        """The same as a sentence."""
        return cache_line(self.as_dict())


def cache_line(facts: Mapping[str, Any]) -> str:
    """What `CacheFacts.as_dict` says, as a sentence."""
    mine, plain, page = facts["kv_bytes_per_token"], facts["plain_kv_bytes_per_token"], facts["page_bytes"]
    used = facts["most_pages_in_use"]
    most = "" if used is None else f"; at most {used:,} pages of {size(page)} in use ({size(used * page)})"
    return (
        f"KV cache: {mine:,.0f} bytes per token (a plain model: {plain:,.0f}), "
        f"{facts['compression_ratio']:.2f} tokens per slot measured{most}; {size(facts['cache_bytes'])} "
        "allocated"
    )

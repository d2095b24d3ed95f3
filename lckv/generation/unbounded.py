"""Generation without end, in memory that does not grow:
attention sinks and a window (`lckv/cache/streaming.py`)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import isfinite
from random import Random
from typing import Any

import torch
from torch import Tensor

from lckv.cache.streaming import StreamingCache
from lckv.generation.detokenize import AnswerText
from lckv.generation.limits import end_tokens, unknown_tokens
from lckv.generation.sampling import SamplingParams, sample
from lckv.generation.token_bytes import TokenBytes
from lckv.generation.verification import NOT_FINITE
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM


def streaming_cache(model: LCKVLlamaForCausalLM, *, sinks: int, window: int) -> StreamingCache:
    """For one row of a model. Raises ValueError for models that merge tokens
    and for more tokens than the model's context."""
    config, compression = model.config, model.config.compression_config()
    layer_types = compression.map(config.num_hidden_layers)
    assert config.num_key_value_heads is not None and config.head_dim is not None
    if sinks + window > config.longest_context:
        raise ValueError(
            f"sinks is {sinks} and window is {window}; together they must be at most the model's context, "
            f"{config.longest_context} tokens."
        )
    return StreamingCache(
        layer_types.kv_layers,
        compression.policy.build(),
        compression.windows(config.num_hidden_layers),
        rows=1,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
        device=model.device,
        frequencies=config.rotary_embedding().frequencies(sinks + window, device=model.device),
        sinks=sinks,
        window=window,
    )


class Continuation:
    """A text that goes on, token by token."""

    def __init__(
        self,
        model: LCKVLlamaForCausalLM,
        tokenizer: Any,
        cache: StreamingCache,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        prefill_chunk: int = 512,
    ) -> None:
        """`prompt` of any length goes through the cache `prefill_chunk` tokens at a time when the first text
        is asked for.

        Raises ValueError for settings that make no sense or name tokens which the model does not have, and
        for those that only the engine follows.
        """
        problems = params.problems() or list(unknown_tokens(params, model.config.vocab_size))
        problems += [
            f"{name} must be None here; the engine (`Engine`) follows it."
            for name in ("prompt_logprobs", "grammar")
            if getattr(params, name) is not None
        ]
        if problems:
            raise ValueError("\n".join(problems))
        self._model, self._cache, self._params = model, cache, params
        self._prompt, self._prefill_chunk = prompt, prefill_chunk
        self._text = AnswerText(TokenBytes(tokenizer), params.stop, prompt, params.visible_tokens)
        self._ends = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else end_tokens(model))))
        self._seen = dict.fromkeys(prompt)  # for the penalties: no more than the vocabulary
        self._answered: Counter[int] = Counter()
        self.tokens = 0
        """New ones so far."""
        self.finish_reason: str | None = None
        """stop or length, at the end."""

    @torch.inference_mode()
    def __iter__(self) -> Iterator[str]:
        """Pieces of the text, as soon as they are certain. Raises ArithmeticError for logits that are no
        numbers."""
        params = self._params
        generator = Random() if params.seed is None else Random(str(params.seed))
        logits = self._prefill()
        while self.finish_reason is None:
            if not isfinite(float(logits.amax())):
                raise ArithmeticError(NOT_FINITE)
            previous = list(self._seen) if params.repetition_penalty != 1 else []
            (choice,) = sample(logits, [params], [generator], [previous], [self._answered])
            self._seen[choice.token] = None
            self._answered[choice.token] += 1
            self.tokens += 1
            if choice.token in self._ends:
                self.finish_reason = "stop"
                break
            yield self._text.add(choice.token)
            if self._text.stopped_by is not None:
                self.finish_reason = "stop"
            elif self.tokens >= params.max_new_tokens:
                self.finish_reason = "length"
            else:
                logits = self._forward([choice.token])
        if self._text.stopped_by is None:
            yield self._text.flush()

    def _prefill(self) -> Tensor:
        """[1, V]: logits after the prompt."""
        last = (len(self._prompt) - 1) // self._prefill_chunk * self._prefill_chunk
        for start in range(0, last, self._prefill_chunk):
            self._run(self._prompt[start : start + self._prefill_chunk], newest=0)
        return self._forward(self._prompt[last:])

    def _forward(self, tokens: Sequence[int]) -> Tensor:
        """[1, V]: logits after the next tokens."""
        return self._model.lm_head(self._run(tokens, newest=1)[:, -1])

    def _run(self, tokens: Sequence[int], *, newest: int) -> Tensor:
        """Hidden states [1, newest, hidden] of so many of the next tokens, at the end."""
        decoder, device = self._model.model, self._model.device
        embedded = decoder.embed_tokens(torch.tensor([tokens], device=device))
        wanted = None
        if newest < len(tokens):
            wanted = torch.arange(len(tokens) - newest, len(tokens), device=device)[None]
        output = decoder.run(embedded, self._cache, wanted=wanted)
        assert output.last_hidden_state is not None
        return output.last_hidden_state

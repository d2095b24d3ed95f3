"""The settings of a generation engine. Light: programs read it for their --help."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """How an engine uses memory, and how it reads prompts."""

    memory_bytes: int | None = None
    """Bytes of the KV cache, tables and all. Default:
    for a full batch, as far as memory goes; see paged_cache."""

    page_size: int = 16
    """Slots in a page of the cache."""

    max_batch_size: int = 64
    """Most sequences at once."""

    max_waiting: int = 1024
    """Most requests that wait; more are refused."""

    max_tokens: int | None = None
    """Most tokens of prompt and answer together. Default: the model's context. Fewer need smaller tables.
    RoPE that depends on the length of a text (longrope, dynamic) is made for so many."""

    max_prompt_tokens: int | None = None
    """Most tokens of a prompt. Default: what max_tokens leaves."""

    prefix_cache: bool = True
    """Keep what was computed for later requests that begin alike, in pages that no request needs."""

    prefill_chunk: int = 512
    """Tokens of prompts that one step computes, beside one token of every answer."""

    prefill: Literal["parallel", "exact"] = "parallel"
    """How prompts are run: many tokens at once, or exact, token by token.
    The two differ only for maps that iterate."""

    prefill_tolerance: float = 0.05
    """For maps that iterate: the relative change of shared keys and values at which passes over a prompt end;
    0: all passes of training."""

    # 0.05 changes perplexity by less than 0.1 %: by 0.03 and 0.08 % in
    # tools/benchmarks/results/prefill_passes.csv, where all 9 passes change it by 0.01 and 0.07 %.

    cuda_graphs: bool = False
    """Launch a step of all answers as a whole, as a CUDA graph of a bucket of requests; needs a GPU."""

    speculation: Literal["none", "prompt_lookup"] = "none"
    """Guess tokens of answers ahead and check them all at once: prompt_lookup copies them from earlier places
    of prompt and answer. Answers stay the same, sampled ones too."""

    speculation_tokens: int = 8
    """Most tokens guessed ahead at once."""

    speculation_match: int = 3
    """Newest tokens that an earlier place must have in common with the text to be copied from."""

    def problems(self) -> list[str]:
        """Everything that makes no sense, a sentence each."""
        counts = {
            "page_size": 1,
            "max_batch_size": 1,
            "max_waiting": 1,
            "max_tokens": 2,
            "max_prompt_tokens": 1,
            "prefill_chunk": 1,
            "speculation_tokens": 1,
            "speculation_match": 1,
        }
        values = {name: getattr(self, name) for name in counts}
        wrong = [
            f"{name} is {values[name]}; it must be at least {least}."
            for name, least in counts.items()
            if values[name] is not None and values[name] < least
        ]
        if self.prefill not in ("parallel", "exact"):
            wrong.append(f"prefill is {self.prefill!r}; it must be 'parallel' or 'exact'.")
        if self.speculation not in ("none", "prompt_lookup"):
            wrong.append(f"speculation is {self.speculation!r}; it must be 'none' or 'prompt_lookup'.")
        if not 0 <= self.prefill_tolerance < 1:
            wrong.append(
                f"prefill_tolerance is {self.prefill_tolerance}; it must be at least 0 (all passes) and "
                "below 1."
            )
        return wrong

"""Fields of vLLM's server that OpenAI's does not have, with the values that mean what is done anyway.

Clients that were written for vLLM send them. Every other value is refused by the field's name.
"""

from typing import Any

ACCEPTED_OF_VLLM: dict[str, tuple[Any, ...]] = {
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # texts have no special tokens
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
"""Of completions and of chats."""

ACCEPTED_OF_VLLM_CHATS = ACCEPTED_OF_VLLM | {
    "echo": (False,),
    "documents": ([],),
    "chat_template": (),
    "include_reasoning": (True, False),  # nothing is set apart as reasoning
    "mm_processor_kwargs": ({},),
}

ACCEPTED_OF_STREAMS: dict[str, tuple[Any, ...]] = {
    "include_obfuscation": (False,),
    "continuous_usage_stats": (False,),
}
"""Of `stream_options`."""

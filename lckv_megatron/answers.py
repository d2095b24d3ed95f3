"""Answers of a model to prompts, printed or written: one, many, and one without end."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lckv.generation.answering import answers
from lckv.generation.requests import Completion
from lckv.generation.stats import EngineStats
from lckv.generation.unbounded import Continuation, streaming_cache
from lckv_megatron.cache_facts import CacheFacts
from lckv_megatron.engine_options import build_engine, engine_config
from lckv_megatron.prompts import Prompt
from lckv_megatron.tables import size
from megatron_ext.atomic import write_file
from megatron_ext.errors import ConfigError


def answer_one(options: argparse.Namespace, model: Any, tokenizer: Any, prompt: Prompt) -> None:
    """One prompt through the engine."""
    engine = build_engine(engine_config(options), model, tokenizer)
    facts = CacheFacts(engine)
    on_token = (lambda event: print(event.text, end="", flush=True)) if options.stream else None
    (completion,) = answers(engine, [(prompt.tokens, prompt.params)], on_token, facts.observe)
    failure = str(completion) if isinstance(completion, ValueError) else completion.error
    if isinstance(completion, ValueError) or failure is not None:
        raise ConfigError(f"the prompt cannot be answered: {failure}")
    if options.json:
        print(answer_line(prompt, completion))
    else:
        print("" if options.stream else completion.text)
    report(facts, len(completion.token_ids), options, engine.stats())


def answer_batch(options: argparse.Namespace, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Many prompts through the engine; those that it refuses get an answer that says why. Raises ConfigError
    then, at the end."""
    engine = build_engine(engine_config(options), model, tokenizer)
    facts = CacheFacts(engine)
    completions = answers(
        engine, [(prompt.tokens, prompt.params) for prompt in prompts], on_step=facts.observe
    )
    lines, failed = [], 0
    bar = tqdm(zip(prompts, completions, strict=True), total=len(prompts), desc="answering", disable=None)
    for prompt, completion in bar:
        failed += isinstance(completion, ValueError) or completion.error is not None
        lines.append(answer_line(prompt, completion))
        if options.output is None:
            print(lines.pop(), flush=True)
    if options.output is not None:
        write_file(options.output, "".join(f"{line}\n" for line in lines).encode())
    report(facts, engine.stats().generated_tokens, options, engine.stats())
    if failed:
        raise ConfigError(
            f"{failed} of {len(prompts)} prompts could not be answered; their lines say why under error."
        )


def answer_unbounded(options: argparse.Namespace, model: Any, tokenizer: Any, prompt: Prompt) -> None:
    """One prompt through a cache that keeps the first tokens and the newest ones."""
    if not prompt.tokens:
        raise ConfigError(
            "the prompt cannot be answered: the prompt is empty; it must have at least one token."
        )
    try:
        cache = streaming_cache(model, sinks=options.sinks, window=options.window)
    except ValueError as error:
        raise ConfigError(f"--window: {error}") from error
    try:
        answer = Continuation(
            model,
            tokenizer,
            cache,
            prompt.tokens,
            prompt.params,
            prefill_chunk=1 if options.prefill == "exact" else options.prefill_chunk,
        )
    except ValueError as error:
        raise ConfigError(f"the prompt cannot be answered: {error}") from error
    started = time.monotonic()
    pieces = []
    try:
        for piece in answer:
            if options.stream:
                print(piece, end="", flush=True)
            else:
                pieces.append(piece)
    except KeyboardInterrupt:
        answer.finish_reason = "interrupted"
    seconds, text = time.monotonic() - started, "".join(pieces)
    facts = {"new_tokens": answer.tokens, "seconds": seconds, "cache_bytes": cache.num_bytes}
    if options.json:
        content = {"id": prompt.name, "text": text, "finish_reason": answer.finish_reason}
        print(json.dumps({**content, "prompt_tokens": len(prompt.tokens)}, ensure_ascii=False))
        print(json.dumps(facts), file=sys.stderr)
        return
    print(text)
    print(
        f"{answer.tokens:,} tokens in {seconds:.2f} s ({answer.tokens / seconds:.1f} tokens/s). KV cache: "
        f"the first {options.sinks:,} and "
        f"the newest {options.window:,} tokens, {size(cache.num_bytes)} allocated",
        file=sys.stderr,
    )


def answer_line(prompt: Prompt, completion: Completion | ValueError) -> str:
    """An answer as JSON."""
    if isinstance(completion, ValueError):
        return json.dumps({"id": prompt.name, "error": str(completion)}, ensure_ascii=False)
    prompt_choices = completion.prompt_logprobs
    content = {
        "id": prompt.name,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "token_ids": completion.token_ids,
        "prefill_passes": completion.prefill_passes,
        "logprobs": completion.logprobs,
        "top_logprobs": completion.top_logprobs,
        "prompt_logprobs": None if prompt_choices is None else [choice.logprob for choice in prompt_choices],
        "prompt_top_logprobs": None
        if prompt_choices is None
        else [choice.top_logprobs for choice in prompt_choices],
        "error": completion.error,
    }
    return json.dumps(
        {name: value for name, value in content.items() if value is not None}, ensure_ascii=False
    )


def report(facts: CacheFacts, tokens: int, options: argparse.Namespace, stats: EngineStats) -> None:
    """What generating took, on standard error."""
    seconds = facts.seconds
    drafted, accepted = stats.drafted_tokens, stats.accepted_tokens
    if options.json:
        drafts = {"drafted_tokens": drafted, "accepted_tokens": accepted} if drafted else {}
        content = {"new_tokens": tokens, "seconds": seconds, **drafts, **facts.as_dict()}
        print(json.dumps(content), file=sys.stderr)
    else:
        drafts_line = f" {accepted:,} of {drafted:,} guessed tokens came." if drafted else ""
        print(
            f"{tokens:,} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s).{drafts_line} "
            f"{facts.line()}",
            file=sys.stderr,
        )

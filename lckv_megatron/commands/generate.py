"""Answers prompts with a model, through its compressed cache.

    lckv-megatron generate --model out/model --prompt "def main(" --stream
    lckv-megatron generate --model out/model --batch prompts.jsonl --output answers.jsonl --temperature 0
    lckv-megatron generate --model out/model --chat --prompt "Who wrote Faust?" --max-new-tokens 200
    lckv-megatron generate --model out/model --sinks 4 --window 1024 --max-new-tokens 99999 --stream < a.txt

Without --prompt and --batch the prompt is read from the standard input. A batch is JSON lines, an object for
each prompt, with any of the sampling settings:
    {"prompt": "...", "id": "a", "temperature": 0.7, "stop": ["\\n"]}
    {"messages": [{"role": "user", "content": "..."}]}
Its answers are JSON lines in the same order. What the cache held is said on standard error.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lckv_megatron.engine_options import (
    add_engine_options,
    add_model_options,
    build_engine,
    engine_config,
    load,
)
from lckv_megatron.tables import size
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.atomic import write_file
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from lckv.generation.requests import Completion
    from lckv_megatron.cache_facts import CacheFacts
    from lckv_megatron.prompts import Prompt


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("generate", __doc__)
    prompts = parser.add_argument_group("prompts").add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="text to continue")
    prompts.add_argument("--batch", type=Path, metavar="FILE", help="JSON lines with a prompt each")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are messages of a user, in the tokenizer's chat format"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is made")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: the answer with its tokens, and facts on standard error",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the answers of a batch here")
    add_model_options(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)"
    )
    sampling.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the likeliest token (default: 1)"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that together reach P",
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens at least P as likely as the likeliest",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: less repetition (default: 1)",
    )
    sampling.add_argument("--seed", type=int, help="the same seed gives the same answer")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; can be repeated"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on behind the end of a document")
    add_engine_options(parser, batch_size=32)
    streaming = parser.add_argument_group("unbounded generation (StreamingLLM): memory that does not grow")
    streaming.add_argument(
        "--window", type=positive, metavar="N", help="keep the newest N tokens only, and the first ones"
    )
    streaming.add_argument(
        "--sinks",
        type=positive,
        default=4,
        metavar="N",
        help="first tokens to keep with --window (default: 4)",
    )
    return parser


def generate(options: argparse.Namespace) -> None:
    """Load the model and answer."""
    from lckv.generation.sampling import SamplingParams
    from lckv_megatron.prompts import Chat, read_batch, single

    if options.stream and (options.batch is not None or options.json):
        raise ConfigError("--stream prints the answer to one prompt as text; leave out --batch and --json.")
    if options.window is not None and options.batch is not None:
        raise ConfigError("--window generates from one prompt; leave out --batch.")
    if options.output is not None and options.batch is None:
        raise ConfigError("--output is for the answers of a --batch.")
    if options.system is not None and not options.chat:
        raise ConfigError("--system is a message of a chat: add --chat.")
    names = (
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "ignore_eos",
    )
    params = SamplingParams(**{name: getattr(options, name) for name in names}, stop=tuple(options.stop))
    if params.problems():
        raise ConfigError(
            "\n".join(
                f"--{problem.replace('_', '-', problem.split()[0].count('_'))}"
                for problem in params.problems()
            )
        )
    model, tokenizer = load(options)
    chat = Chat(tokenizer, options.system) if options.chat else None
    if options.batch is not None:
        answer_batch(options, model, tokenizer, read_batch(options.batch, tokenizer, params, chat))
        return
    text = sys.stdin.read() if options.prompt is None else options.prompt
    prompt = single(text, tokenizer, params, chat)
    if options.window is not None:
        answer_unbounded(options, model, tokenizer, prompt)
    else:
        answer_one(options, model, tokenizer, prompt)


def answer_one(options: argparse.Namespace, model: Any, tokenizer: Any, prompt: "Prompt") -> None:
    """One prompt through the engine."""
    from lckv.generation.answering import answers
    from lckv_megatron.cache_facts import CacheFacts

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
    report(facts, len(completion.token_ids), options)


def answer_batch(
    options: argparse.Namespace, model: Any, tokenizer: Any, prompts: Sequence["Prompt"]
) -> None:
    """Many prompts through the engine; those that it refuses get an answer that says why. Raises ConfigError
    then, at the end."""
    from lckv.generation.answering import answers
    from lckv_megatron.cache_facts import CacheFacts

    engine = build_engine(engine_config(options), model, tokenizer)
    facts = CacheFacts(engine)
    found = answers(engine, [(prompt.tokens, prompt.params) for prompt in prompts], on_step=facts.observe)
    lines, failed = [], 0
    bar = tqdm(zip(prompts, found, strict=True), total=len(prompts), desc="answering", disable=None)
    for prompt, completion in bar:
        failed += isinstance(completion, ValueError) or completion.error is not None
        lines.append(answer_line(prompt, completion))
        if options.output is None:
            print(lines.pop(), flush=True)
    if options.output is not None:
        write_file(options.output, "".join(f"{line}\n" for line in lines).encode())
    report(facts, engine.stats().generated_tokens, options)
    if failed:
        raise ConfigError(
            f"{failed} of {len(prompts)} prompts could not be answered; their lines say why under error."
        )


def answer_unbounded(options: argparse.Namespace, model: Any, tokenizer: Any, prompt: "Prompt") -> None:
    """One prompt through a cache that keeps the first tokens and the newest ones."""
    from lckv.generation.unbounded import Continuation, streaming_cache

    if not prompt.tokens:
        raise ConfigError(
            "the prompt cannot be answered: the prompt is empty; it must have at least one token."
        )
    try:
        cache = streaming_cache(model, sinks=options.sinks, window=options.window)
    except ValueError as error:
        raise ConfigError(f"--window: {error}") from error
    answer = Continuation(
        model,
        tokenizer,
        cache,
        prompt.tokens,
        prompt.params,
        prefill_chunk=1 if options.prefill == "exact" else options.prefill_chunk,
    )
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


def answer_line(prompt: "Prompt", completion: "Completion | ValueError") -> str:
    """An answer as JSON."""
    if isinstance(completion, ValueError):
        return json.dumps({"id": prompt.name, "error": str(completion)}, ensure_ascii=False)
    content = {
        "id": prompt.name,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "token_ids": completion.token_ids,
        "prefill_passes": completion.prefill_passes,
        "logprobs": completion.logprobs,
        "top_logprobs": completion.top_logprobs,
        "error": completion.error,
    }
    return json.dumps(
        {name: value for name, value in content.items() if value is not None}, ensure_ascii=False
    )


def report(facts: "CacheFacts", tokens: int, options: argparse.Namespace) -> None:
    """What generating took, on standard error."""
    seconds = facts.seconds
    if options.json:
        content = {"new_tokens": tokens, "seconds": seconds, **facts.as_dict()}
        print(json.dumps(content), file=sys.stderr)
    else:
        print(
            f"{tokens:,} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s). {facts.line()}",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    set_up_logging()
    try:
        return exit_status(lambda: generate(options))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lckv_megatron.engine_options import (
    add_engine_options,
    add_model_options,
    add_speculation_options,
    check_folders,
    load,
)
from lckv_megatron.unicode_text import check_text
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from megatron_ext.files import check_input, check_output

if TYPE_CHECKING:
    from lckv.generation.grammar import Grammar


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
    _add_sampling_options(parser)
    add_engine_options(parser, batch_size=32)
    add_speculation_options(parser)
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


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
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
    sampling.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="above 0: less of tokens that the answer has (default: 0)",
    )
    sampling.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="above 0: less of tokens, for each time that the answer has them (default: 0)",
    )
    sampling.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        type=_bias,
        metavar="TOKEN=X",
        help="add X, -100 to 100, to the logit of a token; can be repeated",
    )
    sampling.add_argument("--seed", type=int, help="the same seed gives the same answer")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; can be repeated"
    )
    sampling.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="answers are JSON that the schema in this file allows",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on behind the end of a document")


def _grammar(path: Path) -> "Grammar":
    from lckv.generation.grammar import Grammar

    try:
        return Grammar("json_schema", path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--json-schema {path} cannot be read: {error}") from error


def _bias(text: str) -> tuple[str, float]:
    token, _, bias = text.partition("=")
    try:
        return token, float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=X, such as 42=-100") from None


def generate(options: argparse.Namespace) -> None:
    """Load the model and answer."""
    if options.stream and (options.batch is not None or options.json):
        raise ConfigError("--stream prints the answer to one prompt as text; leave out --batch and --json.")
    if options.window is not None and options.batch is not None:
        raise ConfigError("--window generates from one prompt; leave out --batch.")
    if options.window is not None and options.json_schema is not None:
        raise ConfigError("--json-schema is for answers that end; leave out --window.")
    if options.window is not None and options.speculation != "none":
        raise ConfigError(
            f"--speculation is {options.speculation}, but --window generates token by token; leave one out."
        )
    if options.output is not None and options.batch is None:
        raise ConfigError("--output is for the answers of a --batch.")
    if options.system is not None and not options.chat:
        raise ConfigError("--system is a message of a chat: add --chat.")
    check_input("--batch", options.batch)
    check_input("--json-schema", options.json_schema)
    check_output("--output", options.output)
    check_folders([options.model])
    # torch is loaded below only: wrong options and paths are answered at once
    from lckv.generation.penalties import biases_by_token
    from lckv.generation.sampling import SamplingParams
    from lckv_megatron.answers import answer_batch, answer_one, answer_unbounded
    from lckv_megatron.prompts import Chat, read_batch, single

    names = (
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "ignore_eos",
    )
    try:
        biases = biases_by_token(dict(options.logit_bias))
    except ValueError as error:
        raise ConfigError(f"--logit-bias: {error}") from error
    params = SamplingParams(
        **{name: getattr(options, name) for name in names},
        stop=tuple(options.stop),
        logit_bias=biases or None,
        grammar=None if options.json_schema is None else _grammar(options.json_schema),
    )
    if params.problems():
        raise ConfigError(
            "\n".join(
                f"--{problem.replace('_', '-', problem.split()[0].count('_'))}"
                for problem in params.problems()
            )
        )
    text = None if options.batch is not None else _text(options)
    if options.system is not None:
        check_text(options.system, "--system")
    model, tokenizer = load(options)
    chat = Chat(tokenizer, options.system) if options.chat else None
    if text is None:
        answer_batch(options, model, tokenizer, read_batch(options.batch, tokenizer, params, chat))
        return
    prompt = single(text, tokenizer, params, chat)
    if options.window is not None:
        answer_unbounded(options, model, tokenizer, prompt)
    else:
        answer_one(options, model, tokenizer, prompt)


def _text(options: argparse.Namespace) -> str:
    """The only prompt. Raises ConfigError where it is no text."""
    if options.prompt is not None:
        check_text(options.prompt, "--prompt")
        return str(options.prompt)
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the standard input is not UTF-8 text (byte {error.start}).") from error
    check_text(text, "the standard input")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    set_up_logging()
    return exit_status(lambda: generate(options))


if __name__ == "__main__":
    sys.exit(main())

"""Measures the perplexity of texts under a model or a checkpoint.

    lckv-megatron perplexity --model out/model --text wiki.txt
    lckv-megatron perplexity --model out/model --text 'valid/*.jsonl.zst' --context 4096 --stride 1024 \\
        --through cache
    torchrun --nproc-per-node 2 -m lckv_megatron perplexity --load runs/demo/checkpoints --text wiki.txt \\
        --tensor-model-parallel-size 2

A model is a Hugging Face folder. A checkpoint of this project may run on any layout. A text is cut into
windows: the first predicts --context tokens, each further one the next --stride tokens, which see the tokens
before them in the window too. Every token is predicted once, except a text's first where the tokenizer has
none to put before it. Or only --rows rows of --row-length tokens are taken, each as a text of its own whose
first token is given. --through says how windows are computed:
    forward        one forward pass over each, as in training (maps that iterate: with its number of passes)
    cache          as the engine reads prompts: in chunks, through the compressed cache
    tokens         as the engine generates: token by token, through that cache; exact, and slow
    transformers   one forward pass of transformers' own class, for any model that it knows
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lckv_megatron.checkpoint_options import (
    add_layout_options,
    add_map_option,
    add_tokenizer_options,
    check_checkpoint,
)
from lckv_megatron.engine_options import (
    add_engine_options,
    add_model_options,
    build_engine,
    check_folders,
    engine_config,
    load,
    placement,
    served_context,
)
from lckv_megatron.scoring.perplexity import Cut, Measurement, Perplexity
from lckv_megatron.scoring.text_windows import Coder, read_texts, rows_of_texts, whole_texts
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.atomic import write_file
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.data.sources import find_sources
from megatron_ext.errors import ConfigError
from megatron_ext.files import check_output

if TYPE_CHECKING:
    from lckv_megatron.scoring.window_losses import WindowLosses


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("perplexity", __doc__)
    add_model_options(parser, or_checkpoint=True)
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="PATH",
        help="texts, JSON lines, Parquet (also .gz, .zst), folders, globs",
    )
    texts.add_argument(
        "--json-key", default="text", metavar="KEY", help="of the text in a line of JSON (default: text)"
    )
    texts.add_argument(
        "--text-format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="default auto: by the content of the files",
    )
    texts.add_argument("--max-tokens", type=positive, metavar="N", help="predict the first N tokens only")
    texts.add_argument(
        "--no-bos",
        action="store_true",
        help="put no token before texts, even if the tokenizer has one for it",
    )
    texts.add_argument(
        "--context", type=positive, metavar="N", help="tokens of a window (default: the model's context)"
    )
    texts.add_argument(
        "--stride", type=positive, metavar="N", help="new tokens of further windows (default: --context)"
    )
    texts.add_argument("--rows", type=int, metavar="N", help="take only N rows of --row-length tokens")
    texts.add_argument("--row-length", type=int, metavar="N", help="tokens of a row, its first included")
    parser.add_argument(
        "--through",
        choices=("forward", "cache", "tokens", "transformers"),
        default="forward",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--passes",
        type=positive,
        metavar="N",
        help="of maps that iterate, with --through forward (default: training's)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON")
    add_engine_options(parser, batch_size=8)
    checkpoint = parser.add_argument_group("checkpoints (--load)")
    add_tokenizer_options(checkpoint)
    add_map_option(checkpoint)
    add_layout_options(checkpoint)
    return parser


def of_folder(options: argparse.Namespace) -> tuple[Perplexity, dict[str, Any]]:
    """Of a model in Hugging Face's format, and facts of how it was computed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--model runs on one process; start it without torchrun.")
    if options.passes is not None and options.through != "forward":
        raise ConfigError("--passes is for --through forward.")
    if options.layer_types is not None:
        raise ConfigError(
            f"--layer-types is {options.layer_types}, which is for --load; a model of --model has one map: "
            "leave it out."
        )
    if not (options.model / "config.json").is_file():
        raise ConfigError(f"--model {options.model} is not a Hugging Face folder: it has no config.json.")
    check_folders([options.model])
    # torch is loaded below only: wrong options and paths are answered at once
    from lckv.generation.loading import load_tokenizer
    from lckv_megatron.scoring.window_losses import CachedLosses, ParallelLosses, TransformersLosses

    losses: WindowLosses
    if options.through == "transformers":
        device, dtype = placement(options)
        try:
            losses = TransformersLosses(options.model, dtype=dtype, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--model {options.model} cannot be loaded: {error}") from error
        tokenizer, longest = load_tokenizer(options.model), losses.context
        if tokenizer is None:
            raise ConfigError(f"--model {options.model} has no tokenizer; put its files into the folder.")
    else:
        model, tokenizer = load(options)
        longest = served_context(options, model.config)
        if options.through == "forward":
            losses = ParallelLosses(model, options.passes)
        else:
            losses = CachedLosses(
                build_engine(engine_config(options), model, tokenizer),
                token_by_token=options.through == "tokens",
            )
            longest -= 1  # the engine's texts, the last token included, are at most as long as the context
    return measured(options, Coder.of_huggingface(tokenizer, begins=not options.no_bos), longest, losses)


def of_checkpoint(options: argparse.Namespace) -> tuple[Perplexity, dict[str, Any]] | None:
    """Of the newest good checkpoint in `options.load`, in the precision of its run;
    None except on one process."""
    if options.through != "forward" or options.passes is not None:
        raise ConfigError(
            "--through and --passes are for --model; convert the checkpoint, or leave them out."
        )
    check_checkpoint(options.load)
    from lckv_megatron.scoring.checkpoint_losses import CheckpointLosses

    with CheckpointLosses(options) as losses:
        result = measured(options, losses.coder, losses.context, losses)
        return result if losses.has_result else None


def measured(
    options: argparse.Namespace, coder: Coder, longest: int | None, losses: "WindowLosses"
) -> tuple[Perplexity, dict[str, Any]]:
    """Read the texts and measure."""
    cut = cut_of(options, longest)
    strings = read_texts(options.text, options.json_key, options.text_format)
    if options.rows is None:
        texts, total = whole_texts(strings, coder, options.max_tokens), options.max_tokens
    else:
        texts = rows_of_texts(strings, coder, options.rows, options.row_length)
        total = options.rows * (options.row_length - 1)
    started = time.monotonic()
    with tqdm(total=total, unit=" tokens", disable=None) as bar:
        perplexity = Measurement(cut, bar.update).run(texts, losses, options.max_batch_size)
    facts = {"through": options.through, "context": cut.context, "stride": cut.stride, **losses.facts()}
    return perplexity, {**facts, "seconds": time.monotonic() - started}


def cut_of(options: argparse.Namespace, longest: int | None) -> Cut:
    """The windows that were asked for; raises ConfigError for those that make no sense."""
    context, name = options.context or longest, "--context"
    rows, row_length = options.rows, options.row_length
    if rows is not None or row_length is not None:
        if rows is None or row_length is None or rows < 1 or row_length < 2:
            raise ConfigError(
                f"--rows is {rows} and --row-length is {row_length}; they must be at least 1 and 2, and both "
                "be given."
            )
        if (options.context, options.stride, options.max_tokens) != (None, None, None):
            raise ConfigError(
                "--rows and --row-length are given beside --context, --stride or --max-tokens; leave out the "
                "latter."
            )
        context, name = row_length - 1, "--row-length - 1"
    if context is None:
        raise ConfigError("--context is not given, and the model does not say how long its context is.")
    if longest is not None and context > longest:
        raise ConfigError(f"{name} is {context}; it must be at most {longest}, the model's context.")
    stride = options.stride or context
    if stride > context:
        raise ConfigError(
            f"--stride is {stride}; it must be at most --context, {context}, or tokens would be left out."
        )
    return Cut(context, stride)


def show(result: Perplexity, facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a result, and write it where that was asked for."""
    content = {**result.as_dict(), **facts}
    if options.output is not None:
        write_file(options.output, f"{json.dumps(content, indent=1)}\n".encode())
    if options.json:
        print(json.dumps(content, indent=1))
        return
    print(
        f"perplexity {result.perplexity:.4f} ({result.loss:.6f} nats per token, "
        f"{result.bits_per_byte:.4f} bits per byte; {result.tokens:,} tokens in {result.texts:,} texts, "
        f"{result.windows:,} windows of up to {facts['context']:,})"
    )
    ratio, passes, seconds = facts.get("compression_ratio"), facts.get("passes"), facts["seconds"]
    if ratio is not None:
        print(f"{ratio:.2f} tokens per slot of the KV cache")
    if passes is not None:
        print(f"{passes:g} passes over the layers that iterate")
    print(f"{seconds:.1f} s, {result.tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def measure(options: argparse.Namespace) -> None:
    """Measure and show."""
    check_output("--output", options.output)
    find_sources(options.text, text_format=options.text_format)  # what is wrong with them is said at once
    result = of_folder(options) if options.load is None else of_checkpoint(options)
    if result is not None:
        show(*result, options)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    set_up_logging()
    return exit_status(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())

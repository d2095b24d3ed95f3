"""Measures what a small KV cache gains in generation and what it costs, next to a plain model, in one run.

    python -m tools.benchmarks.inference --output tools/benchmarks/results/inference.csv \\
        --picture docs/images/inference.png
    python -m tools.benchmarks.inference --models out/plain out/lckv out/p --text held_out.txt \\
        --lengths 128 256 --context 256
    python -m tools.benchmarks.inference --random plain lckv P8=plain,P:FIELD=VALUE --layers 32 \\
        --hidden-size 4096 --heads 32 --kv-heads 8

Models are Hugging Face folders, or have random weights: a map as in compression.layer_types, or the name of a
layout of lckv_megatron/layouts.py, and a KV policy P with its settings. Ratios are to the first one. Times
are medians of rounds in which the models take turns.

    prefill         a prompt in one piece, up to the logits of its last token; passes over iterated layers as
                    many as it takes to settle
    operations      of that, counted; if nothing else took time, times would have the same ratio
    all passes      the same of maps that iterate, with all m + b passes
    prefill memory  most bytes of tensors alive at once, beside weights and cache
    decode memory   the same, of a step of the largest batch
    first token     from handing a prompt to an idle engine, which reads it in chunks, to one token
    KV bytes        of a token of context, as allocated: pages, tables and the policy's state
    largest batch   sequences of --context tokens that a cache of --memory bytes takes in
    decode step     one more token for each of a batch of such sequences
    tokens/second   of the largest batch
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lckv.generation.config import EngineConfig
from lckv_megatron.measuring.admission import cache_for
from lckv_megatron.measuring.comparison import OF_LARGEST_BATCH, Row, Settings, compare
from lckv_megatron.measuring.subjects import Subject, load_folder, random_tokens, text_tokens
from lckv_megatron.measuring.timing import CLOCKS, setting, write_csv
from lckv_megatron.scoring.text_windows import read_texts
from megatron_ext.arguments import memory_size, positive
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from tools.benchmarks.generation.models import RandomModel, Sizes

RANDOM = ("plain=plain", "LCKV=lckv", "YOCO=yoco")
PLAIN_SEQUENCES = 8
"""Sequences of the first model that the budget holds, if none is given."""


def subjects(options: argparse.Namespace) -> list[Subject]:
    """The models to measure. Raises ConfigError."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    longest = max(options.context, *(length + 1 for length in options.lengths))
    chosen = [_of_folder(text, longest, options, dtype, device) for text in options.models]
    sizes = Sizes(
        options.layers,
        options.hidden_size,
        options.heads,
        options.kv_heads,
        options.vocab_size,
        options.sliding_window,
        longest,
    )
    random = (
        options.random if options.random or options.models else [RandomModel.parse(text) for text in RANDOM]
    )
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    for random_model in random:
        model = random_model.build(sizes, dtype=dtype or default, device=device)
        chosen.append(
            Subject(random_model.name, model, random_tokens(sizes.vocab_size, options.prompts, longest))
        )
    names = [subject.name for subject in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the models are called {', '.join(names)}; each needs a name of its own: its folder's, or "
            "NAME=MAP."
        )
    return chosen


def _of_folder(
    text: str, longest: int, options: argparse.Namespace, dtype: torch.dtype | None, device: torch.device
) -> Subject:
    name, equals, path = text.partition("=")
    folder = Path(path if equals else text)
    model, tokenizer = load_folder(folder, dtype=dtype, device=device)
    context = model.config.max_position_embeddings
    if longest > context:
        raise ConfigError(
            f"--models {folder} has a context of {context} tokens, but {longest} are measured; give smaller "
            "--lengths and --context."
        )
    name = name if equals else folder.resolve().name
    if not options.text:
        return Subject(name, model, random_tokens(model.config.vocab_size, options.prompts, longest))
    if tokenizer is None:
        raise ConfigError(f"--models {folder} has no tokenizer for --text; put its files into the folder.")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return Subject(
        name, model, text_tokens(read_texts(options.text, "text"), encode, options.prompts, longest)
    )


def measure(options: argparse.Namespace) -> None:
    """Measure, print, write. Raises ConfigError."""
    check(options)
    models = subjects(options)
    memory = options.memory or cache_for(models[0].model, PLAIN_SEQUENCES, options.context).num_bytes
    settings = Settings(
        options.lengths,
        options.context,
        options.batches,
        memory,
        options.prefill_tolerance,
        options.repeats,
        options.clock,
    )
    table: list[Row] = []
    names = [subject.name for subject in models]
    print(line("", {name: name for name in names}, names))
    for rows in compare(models, settings):
        table += rows
        print(
            line(title(rows[0]), {row.model: f"{row.value:,.4g} ({row.ratio:.3g}x)" for row in rows}, names),
            flush=True,
        )
    if options.output is not None:
        write_csv(options.output, csv_rows(models, settings, table))
    if options.picture is not None:
        from tools.benchmarks.generation.picture import draw

        draw(table, options.picture)


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what would fail only after minutes."""
    steps = Settings.steps_of(options.repeats)
    if steps >= options.context:
        raise ConfigError(
            f"--context is {options.context}; it must be more than the {steps} tokens that --repeats "
            f"{options.repeats} decodes."
        )
    if not 0 <= options.prefill_tolerance < 1:
        raise ConfigError(
            f"--prefill-tolerance is {options.prefill_tolerance}; it must be at least 0 (all passes) and "
            "below 1."
        )
    for path in (options.output, options.picture):
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def title(row: Row) -> str:
    """Of a line of the table."""
    at = "" if row.measure in OF_LARGEST_BATCH else f" at {row.at:,}"
    return f"{row.measure}{at}{row.unit and f', {row.unit}'}"


def line(first: str, cells: Mapping[str, str], names: Sequence[str]) -> str:
    """Of the table, which has a column for each model."""
    return f"{first:<42}{''.join(f'{cells.get(name, str()):<22}' for name in names)}".rstrip()


def csv_rows(
    models: Sequence[Subject], settings: Settings, rows: Iterable[Row]
) -> Iterator[dict[str, object]]:
    """Rows with what they were measured on."""
    by_name = {subject.name: subject.model for subject in models}
    for row in rows:
        model = by_name[row.model]
        config = model.config
        yield {
            **row._asdict(),
            "value": f"{row.value:.6g}",
            "ratio": round(row.ratio, 4),
            "layer_types": str(model.model.layer_types),
            "policy": model.model.policy.name,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "budget_mebibytes": round(settings.memory_bytes / 2**20, 2),
            "clock": settings.clock,
            **setting(model.device.type),
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_models(parser.add_argument_group("models"))
    _add_measured(parser.add_argument_group("what is measured"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV file to write")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG to draw")
    return parser


def _add_models(models: argparse._ArgumentGroup) -> None:
    models.add_argument(
        "--models", nargs="+", default=[], metavar="[NAME=]FOLDER", help="Hugging Face folders"
    )
    models.add_argument(
        "--text",
        nargs="+",
        help=(
            "files with the text of prompts for --models (default: random tokens); see lckv-megatron "
            "perplexity"
        ),
    )
    models.add_argument(
        "--random",
        type=_random,
        nargs="+",
        default=[],
        metavar="NAME=MAP[,POLICY[:FIELD=VALUE...]]",
        help=f"default: {' '.join(map(repr, RANDOM))}",
    )
    for name, default, meaning in (
        ("layers", 22, ""),
        ("hidden-size", 256, ""),
        ("heads", 8, "query heads "),
        ("kv-heads", 4, ""),
        ("vocab-size", 4096, ""),
        ("sliding-window", 256, "tokens that layers with a window see "),
    ):
        models.add_argument(
            f"--{name}", type=positive, default=default, help=f"{meaning}of --random (default: {default})"
        )
    models.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the folder's; random: float32, on GPUs bfloat16",
    )
    models.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")


def _add_measured(measured: argparse._ArgumentGroup) -> None:
    measured.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[512, 2048],
        help="tokens of prompts (default: 512 2048)",
    )
    measured.add_argument(
        "--context", type=positive, default=1024, help="tokens of sequences in batches (default: %(default)s)"
    )
    measured.add_argument(
        "--batches",
        type=positive,
        nargs="*",
        default=[1, 4],
        help="sequences that are decoded at once (default: 1 4)",
    )
    measured.add_argument(
        "--memory",
        type=memory_size,
        help=f"of the cache (default: what {PLAIN_SEQUENCES} sequences of the first model need)",
    )
    measured.add_argument(
        "--prompts", type=positive, default=2, help="different ones for batches (default: %(default)s)"
    )
    measured.add_argument(
        "--prefill-tolerance",
        type=float,
        default=EngineConfig.prefill_tolerance,
        metavar="X",
        help="see lckv-megatron generate (default: %(default)s)",
    )
    measured.add_argument("--repeats", type=positive, default=5, help="rounds (default: %(default)s)")
    measured.add_argument(
        "--clock", choices=[*CLOCKS], default="wall", help="cpu: on a busy machine, with one thread"
    )
    measured.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")


def _random(text: str) -> RandomModel:
    try:
        return RandomModel.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    set_up_logging()
    torch.set_num_threads(options.threads)
    return exit_status(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())

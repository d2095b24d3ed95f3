"""Says which batch and which context fit into a memory budget for the cache.

    lckv-megatron kv-memory --model out/model --memory 16GiB --context 4096 32768
    lckv-megatron kv-memory --memory 16GiB --config run.yaml --compression.layer_types 0_6_6_6_6_6_6_7

The numbers stand next to those of a plain model of the same size. The cache is the engine's: pages from one
pool. For a sequence of n tokens, per KV head of each layer that computes keys and values,
    pages  ceil(n / CR / page size); where only windowed layers read them, at most those in which W - 1
           neighbouring tokens can lie
    table  4 bytes for each page that n tokens would fill with a slot each, and 8 for a length
    state  what the KV policy keeps besides
with CR = tokens per slot, taken to be the same for all heads, and bytes of a page = 2 x page size x d x bytes
of a number. Weights and activations are not counted.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lckv.cache.cost import CacheModel, largest_batch, longest_context
from lckv.precision import DTYPE_NAMES
from lckv_megatron.engine_options import check_folders
from lckv_megatron.tables import size, table
from megatron_ext.arguments import ProgramParser, memory_size, positive
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from megatron_ext.precision import precision
from megatron_ext.validation.layout import architecture_problems


def model_of_run(run: RunConfig, dtype: str | None, page_size: int) -> CacheModel:
    """Of a run's configuration; raises ConfigError for sizes that do not fit together."""
    if problems := [*architecture_problems(run.model, run.compression, precision(run.train.precision))]:
        raise ConfigError("\n".join(problems))
    if wrong := run.compression.problems_of_model(run.model.num_layers):
        raise ConfigError("\n".join(str(problem.under("compression")) for problem in wrong))
    return CacheModel(
        num_layers=run.model.num_layers,
        kv_heads=run.model.query_groups,
        head_dim=run.model.head_dim,
        compression=run.compression,
        dtype=dtype or precision(run.train.precision).dtype_name,
        page_size=page_size,
        compression_ratio=1.0,
    )


def model_of_folder(folder: Path, dtype: str | None, page_size: int) -> tuple[CacheModel, int]:
    """Of a Hugging Face folder, and its longest context in tokens; raises ConfigError where it is none that
    can be loaded."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder} is not a Hugging Face folder: it has no config.json.")
    check_folders([folder])
    from lckv.generation.loading import model_config  # transformers takes seconds: only folders wait
    from lckv.generation.memory import cache_model

    try:
        config = model_config(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    own = str(config.dtype).removeprefix("torch.")
    dtype = dtype or (own if own in DTYPE_NAMES else "float32")
    return cache_model(config, dtype, page_size), config.max_position_embeddings


def with_ratio(model: CacheModel, given: float | None) -> CacheModel:
    """With the compression ratio that was measured or is asked of training; raises ConfigError where every
    token is kept."""
    policy = model.compression.policy
    if given is not None and policy.traits.keeps_every_token:
        stage = "" if policy.stage is None else f" in stage {policy.stage}"
        raise ConfigError(
            f"--compression-ratio is {given:g}, but this model keeps every token: its policy is "
            f"{policy.name}{stage}."
        )
    if given is not None and not 1 <= given < math.inf:
        raise ConfigError(f"--compression-ratio is {given:g}; it must be at least 1.")
    return replace(model, compression_ratio=policy.compression_ratio if given is None else given)


@dataclass(frozen=True)
class Row:
    """One number of the model and of its plain twin."""

    name: str
    model: float
    plain: float
    show: Callable[[float], str]

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """For the table."""
        less, more = sorted((self.model, self.plain))
        return (
            self.name,
            self.show(self.model),
            self.show(self.plain),
            f"{more / less:.2f}x" if less else "",
        )


def rows(model: CacheModel, memory: int, contexts: Sequence[int], batches: Sequence[int]) -> Iterator[Row]:
    """What is said of a model."""
    plain = model.plain
    yield Row("KV bytes per token", model.bytes_per_token, plain.bytes_per_token, "{:,.0f}".format)
    for tokens in contexts:
        name = f"sequence of {tokens:,} tokens"
        yield Row(
            name, model.sequence_bytes(tokens), plain.sequence_bytes(tokens), lambda number: size(int(number))
        )
    for tokens in contexts:
        mine, theirs = (largest_batch(kind, tokens, memory) for kind in (model, plain))
        yield Row(f"largest batch at {tokens:,} tokens", mine, theirs, "{:,}".format)
    for batch in batches:
        mine, theirs = (longest_context(kind, batch, memory) for kind in (model, plain))
        yield Row(f"longest context of {batch:,} at once", mine, theirs, "{:,}".format)


def describe(
    model: CacheModel, memory: int, contexts: Sequence[int], batches: Sequence[int]
) -> Iterator[str]:
    """The answer as text, a line each."""
    compression, (growing, windowed) = model.compression, model.layers
    yield (
        f"keys and values of {growing + windowed} of {model.num_layers} layers, {model.kv_heads} KV heads of "
        f"{model.head_dim} channels in "
        f"{model.dtype}; pages of {model.page_size} slots, {size(model.page_bytes)}"
    )
    if windowed:
        yield f"{windowed} of them only for a window of {compression.sliding_window:,} tokens"
    policy = compression.policy
    if not policy.traits.keeps_every_token:
        state = f"{size(model.state_bytes)} per sequence" if model.state_bytes else "none"
        ratio = f"{model.compression_ratio:g} tokens per slot"
        yield f"KV policy {policy.describe()}; {ratio}; its state: {state}"
    yield ""
    yield from table(
        [
            (f"with {size(memory)}", "this model", "plain model", ""),
            *(row.cells for row in rows(model, memory, contexts, batches)),
        ]
    )


def as_json(model: CacheModel, memory: int, contexts: Sequence[int], batches: Sequence[int]) -> str:
    """The answer for programs: bytes, tokens and sequences."""

    def facts(kind: CacheModel) -> dict[str, object]:
        return {
            "kv_bytes_per_token": kind.bytes_per_token,
            "state_bytes_per_sequence": kind.state_bytes,
            "sequence_bytes": {tokens: kind.sequence_bytes(tokens) for tokens in contexts},
            "largest_batch": {tokens: largest_batch(kind, tokens, memory) for tokens in contexts},
            "longest_context": {batch: longest_context(kind, batch, memory) for batch in batches},
        }

    settings = {**asdict(model), "page_bytes": model.page_bytes, "memory": memory}
    return json.dumps({**settings, "model": facts(model), "plain": facts(model.plain)}, indent=2)


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser(
        "kv-memory",
        __doc__,
        usage=(
            "%(prog)s --memory SIZE (--model FOLDER | [--config FILE ...] [--section.key VALUE ...]) "
            "[options]"
        ),
        epilog="Settings of a run: pretrain_lckv.py --help.",
    )
    parser.add_argument(
        "--memory", type=memory_size, required=True, help="budget for the cache, such as 16GiB"
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="Hugging Face folder (else: the settings of a run)"
    )
    parser.add_argument(
        "--context", type=positive, nargs="+", help="tokens per sequence (default: the model's longest)"
    )
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1], help="sequences at once (default: 1)"
    )
    parser.add_argument(
        "--page-size", type=positive, default=16, help="slots per page (default: %(default)s)"
    )
    parser.add_argument(
        "--compression-ratio",
        type=float,
        help="tokens per slot, for instance measured ones (default: asked of training)",
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of keys and values (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def answer(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print it; `rest` are the options that describe a run."""
    if options.model is not None:
        if rest:
            raise ConfigError(
                f"{' '.join(rest)} is given beside --model; a folder says all of the model itself."
            )
        model, longest = model_of_folder(options.model, options.dtype, options.page_size)
    else:
        run = parse_run_config(rest)
        model = model_of_run(run, options.dtype, options.page_size)
        longest = run.model.max_position_embeddings or run.train.seq_length
    model = with_ratio(model, options.compression_ratio)
    question = (model, options.memory, options.context or [longest], options.batch)
    print(as_json(*question) if options.json else "\n".join(describe(*question)))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options, rest = _parser().parse_known_args(argv)
    set_up_logging()
    return exit_status(lambda: answer(options, rest))


if __name__ == "__main__":
    sys.exit(main())

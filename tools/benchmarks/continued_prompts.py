"""What the next tokens of a prompt cost when its beginning is in the cache, beside transformers' own
LlamaForCausalLM with its own cache, in one run.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.continued_prompts \\
        --output tools/benchmarks/results/continued_prompts.csv

All read --new tokens behind --past tokens, up to the logits of the last one: transformers' model, this
project's Hugging Face model, and its engine's model on pages. All have the same sizes and plain maps. Seconds
are those in which the process computed, medians of rounds in which all take turns.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lckv.generation.forward import Forward
from lckv.models.cache import CACHE_NAME, LCKVCache
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.sharing.early_exit import Results
from lckv_megatron.measuring.admission import cache_for
from lckv_megatron.measuring.subjects import random_tokens
from lckv_megatron.measuring.timing import median_seconds, setting, write_csv
from tools.benchmarks.generation.models import RandomModel, Sizes, transformers_llama

VOCABULARY = 4096


def transformers_call(sizes: Sizes, past: Tensor, new: Tensor) -> Callable[[], object]:
    """Of a model with the same sizes, as people call it."""
    from transformers import DynamicCache

    llama, cache = transformers_llama(sizes), DynamicCache()
    llama(past, **{CACHE_NAME: cache}, logits_to_keep=1)

    def call() -> None:
        llama(new, **{CACHE_NAME: cache}, logits_to_keep=1)
        cache.crop(-new.shape[1])

    return call


def own_call(model: LCKVLlamaForCausalLM, past: Tensor, new: Tensor) -> Callable[[], object]:
    """The Hugging Face model, called in the same way."""
    cache = LCKVCache(model.config)
    model(past, cache=cache, logits_to_keep=1)

    def call() -> None:
        model(new, cache=cache, logits_to_keep=1)
        cache.crop(-new.shape[1])

    return call


def engine_call(model: LCKVLlamaForCausalLM, past: Tensor, new: Tensor) -> Callable[[], object]:
    """The engine's forward on pages, from a beginning that is kept."""
    cache = cache_for(model, 2, past.shape[1] + new.shape[1])
    forward = Forward(model, cache, tolerance=0.0)
    first = cache.open()
    forward([first], past.tolist(), Results.NONE)
    beginning, tokens = cache.keep(first), new.tolist()
    cache.close(first)

    def call() -> None:
        sequence = cache.open(beginning)
        forward.newest_logits(forward([sequence], tokens, Results.SOME), [0])
        cache.close(sequence)

    return call


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row per length and way."""
    for length in options.past:
        sizes = Sizes(
            layers=options.layers,
            hidden_size=options.hidden_size,
            heads=options.hidden_size // 32,
            kv_heads=options.hidden_size // 64,
            vocab_size=VOCABULARY,
            sliding_window=length,
            context=length + options.new,
        )
        model = RandomModel.parse("plain").build(sizes, dtype=torch.float32, device=torch.device("cpu"))
        past, new = random_tokens(VOCABULARY, 1, length + options.new).split([length, options.new], 1)
        calls = {
            "transformers": transformers_call(sizes, past, new),
            "this project": own_call(model, past, new),
            "this project's engine": engine_call(model, past, new),
        }
        seconds = median_seconds(calls, repeats=options.repeats, clock="cpu")
        for name, measured in seconds.items():
            yield {
                "past_tokens": length,
                "new_tokens": options.new,
                "model": name,
                "cpu_milliseconds": round(1000 * measured, 1),
                "ratio_to_transformers": round(measured / seconds["transformers"], 3),
                "layers": options.layers,
                "hidden_size": options.hidden_size,
                **setting("cpu"),
            }


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--past", type=int, nargs="+", default=[2048, 8192, 16384], help="default: %(default)s"
    )
    parser.add_argument("--new", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    rows = []
    for row in measure(options):
        print("  ".join(f"{value:>8}" for value in list(row.values())[:5]), flush=True)
        rows.append(row)
    if options.output:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()

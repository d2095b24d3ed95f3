"""A step of decoding beside transformers' LlamaForCausalLM with its DynamicCache, in one run: CPU time, and
what it launches.

    python -m tools.benchmarks.decode_step --output tools/benchmarks/results/decode_step.csv

A step computes one more token of every row and chooses the next one greedily. Models of all kinds have the
same sizes and random weights.

    transformers  LlamaForCausalLM
    contiguous    this project's model as `generate` calls it
    paged         the same on pages, as the engine calls it, without its requests
    engine        the whole step of the engine

With --models it is these on pages that are measured, beside transformers:

    python -m tools.benchmarks.decode_step --models plain=plain NAME=MAP,POLICY:FIELD=VALUE --tokens 3000

Kernels are operators that make or change tensors and call no other one; calls are all calls of operators.
Seconds are those in which the process computed: medians of rounds in which all kinds take
turns.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.models.cache import CACHE_NAME
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv_megatron.measuring.admission import cache_for, committed
from lckv_megatron.measuring.measures import Decoding
from lckv_megatron.measuring.subjects import Subject, random_tokens
from lckv_megatron.measuring.timing import median_seconds, setting, write_csv
from tools.benchmarks.generation.models import RandomModel, Sizes, transformers_llama
from tools.benchmarks.operators import operators_of
from tools.benchmarks.policies import merging_policies

VOCABULARY = 4096


def models() -> dict[str, str]:
    """As `RandomModel.parse` takes them, by what is put before the name of a kind."""
    merging = {f"{name.upper()} ": f"plain,{text}" for name, text in merging_policies().items()}
    return {"": "plain", "LCKV ": "lckv"} | merging


def transformers_step(sizes: Sizes, tokens: torch.Tensor) -> Callable[[], object]:
    """A step of transformers' model of these sizes."""
    from transformers import DynamicCache

    return _greedy(transformers_llama(sizes), DynamicCache(), tokens)


def contiguous_step(model: LCKVLlamaForCausalLM, tokens: torch.Tensor) -> Callable[[], object]:
    """A step of this project's model as `generate` calls it."""
    with torch.inference_mode():
        cache = model(tokens[:, :1], use_cache=True)[CACHE_NAME]
    return _greedy(model, cache, tokens[:, 1:])


def _greedy(model: Any, cache: Any, tokens: torch.Tensor) -> Callable[[], object]:
    with torch.inference_mode():
        logits = model(tokens, **{CACHE_NAME: cache}, use_cache=True).logits
    newest = [logits[:, -1].argmax(-1)]

    @torch.inference_mode()
    def step() -> list[int]:
        logits = model(newest[0][:, None], **{CACHE_NAME: cache}, use_cache=True).logits
        newest[0] = logits[:, -1].argmax(-1)
        return newest[0].tolist()

    return step


def engine_step(subject: Subject, sizes: Sizes) -> Callable[[], object]:
    """A step of the engine when all its requests decode."""
    rows, length = subject.prompts.shape
    cache = cache_for(subject.model, rows, sizes.context)
    engine = Engine(
        subject.model,
        EngineConfig(max_batch_size=rows, prefix_cache=False, prefill_tolerance=0.1),
        cache=cache,
    )
    params = SamplingParams(temperature=0.0, max_new_tokens=sizes.context - length, ignore_eos=True)
    for prompt in subject.prompts.tolist():
        engine.submit(prompt, params)
    while len(engine.step()) < rows:
        pass
    return engine.step


def steps_of(
    sizes: Sizes, rows: int, tokens: int, chosen: Sequence[RandomModel] = ()
) -> dict[str, Callable[[], object]]:
    """By the name of their kind. `chosen`: what is measured in place of the usual models, on pages."""
    prompts = random_tokens(sizes.vocab_size, rows, tokens)
    longer = random_tokens(sizes.vocab_size, rows, sizes.context)
    steps = {"transformers": transformers_step(sizes, prompts)}
    usual = {} if chosen else {prefix: RandomModel.parse(text) for prefix, text in models().items()}
    for prefix, described in (usual or {f"{model.name} ": model for model in chosen}).items():
        model = described.build(sizes, dtype=torch.float32, device=torch.device("cpu"))
        if not prefix:
            steps["contiguous"] = contiguous_step(model, prompts)
        of_prompts = committed(model, prompts)
        subject = Subject(prefix, model, longer)
        steps[f"{prefix}paged"] = Decoding(subject, rows, of_prompts, max_tokens=sizes.context)
        if usual:
            steps[f"{prefix}engine"] = engine_step(Subject(prefix, model, prompts), sizes)
    return steps


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[128, 2048], help="of each row, before the first step"
    )
    parser.add_argument("--models", type=RandomModel.parse, nargs="+", default=[], help="NAME=MAP,POLICY")
    parser.add_argument("--heads", type=int, nargs=2, default=[4, 2], help="of queries, and of keys")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    heads, kv_heads = options.heads
    table: list[dict[str, object]] = []
    for hidden in options.hidden_sizes:
        for tokens in options.tokens:
            # More steps than there are repeats: some are counted, and engines step once more per round.
            context = tokens + 2 * options.repeats + 16
            sizes = Sizes(options.layers, hidden, heads, kv_heads, VOCABULARY, 64, context)
            for rows in options.rows:
                table += measured(sizes, rows, tokens, options.repeats, options.models)
    if options.output:
        write_csv(options.output, table)


def measured(
    sizes: Sizes, rows: int, tokens: int, repeats: int, chosen: Sequence[RandomModel] = ()
) -> list[dict[str, object]]:
    """A line for each kind of step."""
    steps = steps_of(sizes, rows, tokens, chosen)
    seconds = median_seconds(steps, repeats=repeats, warmup=3, clock="cpu")
    lines: list[dict[str, object]] = []
    for name, step in steps.items():
        ratio = seconds[name] / seconds["transformers"]
        by_name, calls = operators_of(step)
        kernels = sum(by_name.values())
        print(
            f"hidden {sizes.hidden_size:>4}, {rows} rows x {tokens:>4} tokens  {name:<13}"
            f"{1000 * seconds[name]:8.2f} ms {ratio:5.2f}x  {kernels:>4} kernels {calls:>5} calls",
            flush=True,
        )
        lines.append(
            {
                "hidden_size": sizes.hidden_size,
                "layers": sizes.layers,
                "rows": rows,
                "tokens": tokens,
                "step": name,
                "cpu_milliseconds": round(1000 * seconds[name], 3),
                "ratio_to_transformers": round(ratio, 3),
                "kernels": kernels,
                "calls": calls,
                **setting("cpu"),
            }
        )
    return lines


if __name__ == "__main__":
    main()

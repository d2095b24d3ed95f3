"""Times whole training steps of few tokens, where everything around the model counts, beside transformers'
LlamaForCausalLM under torch's fused AdamW, in one run.

    python -m tools.benchmarks.small_steps --output tools/benchmarks/results/small_steps.csv

Both have the same sizes, clip gradients by their norm and read the loss. Seconds are those in which the
process computed: of use where other programs run meanwhile.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from lckv.config import CompressionConfig
from lckv_megatron.measuring.timing import median_seconds, setting, write_csv
from megatron_ext.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.parallel.process_groups import chunks_of_rank, destroy, device_of_rank, initialize
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.step import train_step

OPTIMIZER = OptimizerConfig(lr=1e-4, clip_grad=1.0)
VOCABULARY = 4096


def sizes(options: argparse.Namespace) -> ModelConfig:
    """Of both models."""
    return ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.hidden_size // 64,
        untie_embeddings_and_output_weights=True,
    )


def own_step(
    model: ModelConfig,
    tokens: int,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
    compression: CompressionConfig = CompressionConfig(),  # noqa: B008 - frozen
    *,
    sends_to_itself: bool = False,
) -> Callable[[], object]:
    """A step of this project's program, without its reports. Needs process groups. `sends_to_itself`: a rank
    without others of its data-parallel group calls Megatron's collectives nevertheless."""
    train = TrainConfig(
        seq_length=tokens, micro_batch_size=1, global_batch_size=1, train_iters=1000, precision="fp32"
    )
    ddp = wrap(build_stage(model, compression, parallel, train, vocab_size=VOCABULARY), parallel, train)
    if sends_to_itself:
        for name in ("start_param_sync", "start_grad_sync", "finish_grad_sync"):
            setattr(ddp, name, partial(getattr(DistributedDataParallel, name), ddp))
    optimizer, scheduler = build_optimizer(OPTIMIZER, parallel, train, ddp)
    batch = partial(make_batch, data=DataConfig(), eod=None, device=device_of_rank(), chunks=chunks_of_rank())
    samples = _samples(tokens)
    return lambda: train_step(ddp, optimizer, scheduler, samples, batch, train, progress=0.5)


def _samples(tokens: int) -> Iterator[Mapping[str, Tensor]]:
    text = torch.randint(VOCABULARY, (1, tokens + 1), generator=torch.Generator().manual_seed(1))
    return repeat(
        {"tokens": text[:, :-1], "labels": text[:, 1:], "sample_ids": torch.zeros(1, dtype=torch.int64)}
    )


def transformers_step(model: ModelConfig, tokens: int) -> Callable[[], object]:
    """A step of the same sizes as people write it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.query_groups,
            max_position_embeddings=tokens,
            use_cache=False,
        )
    )
    llama.to(device_of_rank())  # type: ignore[arg-type]  # transformers' annotation
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2), fused=True
    )
    text = torch.randint(VOCABULARY, (1, tokens), device=device_of_rank())

    def step() -> float:
        loss = llama(input_ids=text, labels=text).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    initialize(ParallelConfig(), seed=1)
    model, rows = sizes(options), []
    for tokens in options.tokens:
        steps = {"transformers": transformers_step(model, tokens), "this project": own_step(model, tokens)}
        measured = median_seconds(steps, repeats=options.repeats, warmup=2, clock="cpu")
        for name, seconds in measured.items():
            ratio = seconds / measured["transformers"]
            print(f"{tokens:>5} tokens  {name:<13} {1000 * seconds:8.1f} ms  {ratio:5.2f}x", flush=True)
            rows.append(
                {
                    "tokens": tokens,
                    "step": name,
                    "cpu_milliseconds": round(1000 * seconds, 1),
                    "ratio_to_transformers": round(ratio, 3),
                    "layers": options.layers,
                    "hidden_size": options.hidden_size,
                    **setting(device_of_rank().type),
                }
            )
    if options.output:
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()

"""Continues a text with a trained model, as it was trained: no cache, the whole text runs for every token.

    python tools/sample.py --load runs/demo/checkpoints --prompt "def main("

For looking at a run; the engine with a cache that really shrinks serves exported models.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import ParallelConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from megatron_ext.training.logits import compute_logits
from megatron_ext.training.restore import restore


def continue_tokens(
    stage: SharedKVGPTModel,
    prompt: list[int],
    *,
    new_tokens: int,
    context: int,
    temperature: float,
    top_k: int,
    eod: int,
    seed: int,
) -> list[int]:
    """Up to `new_tokens` token ids after `prompt`, until `eod`; at temperature 0 the likeliest. The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(new_tokens):
        window = torch.tensor([tokens[-context:]], device=device_of_rank())
        logits = compute_logits(stage, window)
        token = _agree(None if logits is None else _choose(logits[0, -1].cpu(), temperature, top_k, generator))
        if token == eod:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best = logits.topk(min(top_k or len(logits), len(logits)))
    drawn = torch.multinomial((best.values / temperature).softmax(0), 1, generator=generator)
    return int(best.indices[drawn])


def _agree(token: int | None) -> int:
    """What the last pipeline stage chose, on every stage."""
    chosen = torch.tensor([-1 if token is None else token], device=device_of_rank())
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(chosen, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return int(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = jsonargparse.ArgumentParser(description=__doc__, formatter_class=jsonargparse.DefaultHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="directory of checkpoints, or one checkpoint")
    parser.add_argument("--prompt", type=str, required=True, help="text to continue")
    parser.add_argument("--new_tokens", type=int, default=64, help="most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="choose among so many likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="of the choice")
    parser.add_argument("--parallel", type=ParallelConfig, default=ParallelConfig())
    options = parser.instantiate(parser.parse_args(argv))
    set_up_logging()
    return exit_status(lambda: sample(options))


def sample(options: jsonargparse.Namespace) -> None:
    """Print the continued prompt from rank 0."""
    if options.temperature < 0 or options.top_k < 0 or options.new_tokens < 1:
        raise ConfigError(
            f"--temperature is {options.temperature}, --top_k {options.top_k}, --new_tokens {options.new_tokens}; they must be at "
            "least 0, 0 and 1."
        )
    initialize(options.parallel, seed=options.seed)
    restored = restore(options.load, options.parallel)
    data = restored.run.data
    tokenizer = load_tokenizer(data.tokenizer_type, data.tokenizer_model)
    prompt = tokenizer.encode(options.prompt) or [tokenizer.eod]
    added = continue_tokens(
        restored.stage,
        prompt,
        new_tokens=options.new_tokens,
        context=restored.run.train.seq_length,
        temperature=options.temperature,
        top_k=options.top_k,
        eod=tokenizer.eod,
        seed=options.seed,
    )
    if dist.get_rank() == 0:
        print(tokenizer.decode(prompt + added))
    destroy()


if __name__ == "__main__":
    sys.exit(main())

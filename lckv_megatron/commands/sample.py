"""Continues a text with a checkpoint, as it was trained: without a cache.

    lckv-megatron sample --load runs/demo/checkpoints --prompt "def main("

For looking at a run: the whole text runs for every token.
The tokenizer is that of the run unless another is given.
"""

import argparse
import sys
from collections.abc import Sequence

from lckv.generation.factors import RANGE, is_factor
from lckv_megatron.checkpoint_options import (
    add_layout_options,
    add_load_option,
    add_tokenizer_options,
    check_checkpoint,
    layout,
    tokenizer_of_run,
)
from lckv_megatron.unicode_text import check_text
from megatron_ext.arguments import ProgramParser
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ProgramParser("sample", __doc__)
    add_load_option(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="most tokens to add (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, help="choose among so many likeliest tokens; 0: all (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the choice (default: 1)")
    add_tokenizer_options(parser)
    add_layout_options(parser)
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: sample(options))


def sample(options: argparse.Namespace) -> None:
    """Print the continued prompt from rank 0."""
    if options.temperature != 0 and not is_factor(options.temperature):
        raise ConfigError(
            f"--temperature is {options.temperature}; it must be 0 (the likeliest token), or {RANGE}."
        )
    if options.top_k < 0 or options.new_tokens < 1:
        raise ConfigError(
            f"--top-k is {options.top_k}, --new-tokens {options.new_tokens}; they must be at least 0 and 1."
        )
    check_text(options.prompt, "--prompt")
    check_checkpoint(options.load)
    # torch and Megatron are loaded here, when logging is set up and the checkpoint is there
    import torch.distributed as dist

    from megatron_ext.evaluation.sampling import continue_tokens
    from megatron_ext.parallel.process_groups import destroy, initialize
    from megatron_ext.restoring.model import restore

    tokenizer, parallel = tokenizer_of_run(options), layout(options)
    initialize(parallel, seed=options.seed)
    restored = restore(options.load, parallel, layer_types=options.layer_types)
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

"""Continues a text with a trained model, as it was trained: no cache, the whole text runs for every token.

    python tools/sample.py --load runs/demo/checkpoints --prompt "def main("

For looking at a run. The tokenizer is that of the run unless another is given.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.config import DataConfig, ParallelConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", type=Path, required=True, help="directory of checkpoints, or one checkpoint"
    )
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--new_tokens", type=int, default=64, help="most tokens to add (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top_k", type=int, default=50, help="choose among so many likeliest tokens; 0: all (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the choice (default: 1)")
    parser.add_argument(
        "--tokenizer_type", choices=["huggingface", "sentencepiece", "tiktoken"], help="default: the run's"
    )
    parser.add_argument("--tokenizer_model", help="directory or file of the tokenizer (default: the run's)")
    parser.add_argument(
        "--tensor_model_parallel_size", type=int, default=1, help="as in training (default: 1)"
    )
    parser.add_argument(
        "--pipeline_model_parallel_size", type=int, default=1, help="as in training (default: 1)"
    )
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: sample(options))


def sample(options: argparse.Namespace) -> None:
    """Print the continued prompt from rank 0."""
    if options.temperature < 0 or options.top_k < 0 or options.new_tokens < 1:
        raise ConfigError(
            f"--temperature is {options.temperature}, --top_k {options.top_k}, --new_tokens "
            f"{options.new_tokens}; they must be at "
            "least 0, 0 and 1."
        )
    # torch and Megatron are loaded here, when logging is set up
    import torch.distributed as dist

    from megatron_ext.command_line import config_from_dict
    from megatron_ext.data.tokenizers import load_tokenizer
    from megatron_ext.evaluation.sampling import continue_tokens
    from megatron_ext.parallel.process_groups import destroy, initialize
    from megatron_ext.restoring.model import restore, saved_settings

    saved = saved_settings(options.load)
    saved.pop("architecture")
    data = tokenizer_settings(config_from_dict(saved).data, options)
    tokenizer = load_tokenizer(data.tokenizer_type, data.tokenizer_model)
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    initialize(parallel, seed=options.seed)
    restored = restore(options.load, parallel)
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


def tokenizer_settings(saved: DataConfig, options: argparse.Namespace) -> DataConfig:
    """The run's tokenizer, or the one given; ConfigError where there is none."""
    data = replace(
        saved,
        tokenizer_type=options.tokenizer_type or saved.tokenizer_type,
        tokenizer_model=options.tokenizer_model or saved.tokenizer_model,
    )
    if data.tokenizer_type == "none":
        raise ConfigError(
            "the run had no tokenizer (data.tokenizer_type is none); give --tokenizer_type and "
            "--tokenizer_model."
        )
    return data


if __name__ == "__main__":
    sys.exit(main())

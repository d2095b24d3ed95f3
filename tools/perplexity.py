"""Perplexity of a text: of a model in a Hugging Face folder, or of a checkpoint of this project on any layout.

    python -m tools.perplexity --hf_path out/model --text wiki.txt
    torchrun --nproc-per-node 2 -m tools.perplexity --load runs/demo/checkpoints --text wiki.txt --tensor_model_parallel_size 2

The text's first tokens are cut into rows; each row is a text of its own, and its first token is not predicted.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.atomic import write_file
from megatron_ext.config import ParallelConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError
from tools.sample import tokenizer_settings

if TYPE_CHECKING:
    from megatron_ext.training.perplexity import Perplexity


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf_path", type=Path, help="Hugging Face folder")
    model.add_argument("--load", type=Path, help="directory of checkpoints, or one checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="text file, UTF-8")
    parser.add_argument("--rows", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--row_length", type=int, default=1024, help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--tokenizer_type",
        choices=["huggingface", "sentencepiece", "tiktoken"],
        help="default: the run's, or huggingface",
    )
    parser.add_argument(
        "--tokenizer_model",
        help="directory or file of the tokenizer (default: the run's, or that of the Hugging Face folder)",
    )
    parser.add_argument("--tensor_model_parallel_size", type=int, default=1, help="of --load (default: 1)")
    parser.add_argument("--pipeline_model_parallel_size", type=int, default=1, help="of --load (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Print one line, from the process that has the result."""
    found = of_folder(options) if options.hf_path is not None else of_checkpoint(options)
    if found is None:
        return
    print(f"perplexity {found.value:.4f} ({found.loss:.6f} nats per token, {found.tokens:,} tokens)")
    if options.output is not None:
        content = {"perplexity": found.value, "loss": found.loss, "tokens": found.tokens}
        write_file(options.output, json.dumps(content, indent=1).encode())


def of_folder(options: argparse.Namespace) -> "Perplexity":
    """Of the model in `options.hf_path`, computed in float32 by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    import lckv  # noqa: F401  its models
    from megatron_ext.data.tokenizers import load_tokenizer
    from megatron_ext.training.perplexity import perplexity, text_rows

    if not (options.hf_path / "config.json").is_file():
        raise ConfigError(f"--hf_path {options.hf_path} is not a Hugging Face folder: it has no config.json.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--hf_path runs on one process; start it without torchrun.")
    tokenizer = load_tokenizer(options.tokenizer_type or "huggingface", options.tokenizer_model or str(options.hf_path))
    rows = text_rows(options.text, tokenizer, options.rows, options.row_length)
    model = AutoModelForCausalLM.from_pretrained(options.hf_path, dtype=torch.float32).eval()
    with torch.no_grad():
        found = perplexity(rows, (model(row[None], use_cache=False).logits[0] for row in rows))
    assert found is not None
    return found


def of_checkpoint(options: argparse.Namespace) -> "Perplexity | None":
    """Of the newest good checkpoint in `options.load`, in the precision of its run; None except on one process."""
    from megatron.core import parallel_state

    from megatron_ext.command_line import config_from_dict
    from megatron_ext.data.tokenizers import load_tokenizer
    from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
    from megatron_ext.training.logits import compute_logits
    from megatron_ext.training.perplexity import perplexity, text_rows
    from megatron_ext.training.restore import restore, saved_settings

    saved = saved_settings(options.load)
    saved.pop("architecture")
    data = tokenizer_settings(config_from_dict(saved).data, options)
    rows = text_rows(
        options.text, load_tokenizer(data.tokenizer_type, data.tokenizer_model), options.rows, options.row_length
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    initialize(parallel, seed=1)
    stage = restore(options.load, parallel).stage
    batches = (compute_logits(stage, row[None].to(device_of_rank())) for row in rows)
    found = perplexity(rows, (None if batch is None else batch[0] for batch in batches))
    first = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()) == (0, 0)
    destroy()
    return found if first else None


if __name__ == "__main__":
    sys.exit(main())

"""Options of programs that load a checkpoint of this project: on which layout, with which tokenizer."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpointing.folders import find_candidates
from megatron_ext.config import DataConfig, ParallelConfig
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ext.data.tokenizers import Tokenizer


def add_load_option(parser: Any) -> None:
    """Which checkpoint."""
    parser.add_argument(
        "--load", type=Path, required=True, metavar="DIR", help="directory of checkpoints, or one checkpoint"
    )
    add_map_option(parser)


def add_map_option(parser: Any) -> None:
    """`parser`: a parser or one of its groups."""
    parser.add_argument(
        "--layer-types",
        metavar="MAP",
        help="the map with which to run a model that was trained with a family of maps",
    )


def check_checkpoint(path: Path) -> None:
    """Raises CheckpointError where there is no checkpoint to load at `path`, before Megatron is loaded."""
    find_candidates(path)


def add_tokenizer_options(parser: Any) -> None:
    """`parser`: a parser or one of its groups."""
    parser.add_argument(
        "--tokenizer-type", choices=["huggingface", "sentencepiece", "tiktoken"], help="default: the run's"
    )
    parser.add_argument("--tokenizer-model", help="directory or file of the tokenizer (default: the run's)")


def add_layout_options(parser: Any) -> None:
    """`parser`: a parser or one of its groups."""
    for size in ("tensor-model", "pipeline-model", "context"):
        parser.add_argument(
            f"--{size}-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help="as in training (default: 1)",
        )


def layout(options: argparse.Namespace) -> ParallelConfig:
    """The one that was asked for."""
    return ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        context_parallel_size=options.context_parallel_size,
    )


def tokenizer_of_run(options: argparse.Namespace) -> "Tokenizer":
    """The tokenizer of the run at `options.load`, or the one given.

    Raises ConfigError where there is none.
    """
    from megatron_ext.command_line import config_from_dict
    from megatron_ext.data.tokenizers import load_tokenizer
    from megatron_ext.restoring.description import saved_settings

    saved = saved_settings(options.load)
    saved.pop("architecture", None)
    data = tokenizer_settings(config_from_dict(saved).data, options)
    return load_tokenizer(data.tokenizer_type, data.tokenizer_model)


def tokenizer_settings(saved: DataConfig, options: argparse.Namespace) -> DataConfig:
    """The run's tokenizer, or the one given; ConfigError where there is none."""
    data = replace(
        saved,
        tokenizer_type=options.tokenizer_type or saved.tokenizer_type,
        tokenizer_model=options.tokenizer_model or saved.tokenizer_model,
    )
    if data.tokenizer_type == "none":
        raise ConfigError(
            "the run had no tokenizer (data.tokenizer_type is none); give --tokenizer-type and "
            "--tokenizer-model."
        )
    return data

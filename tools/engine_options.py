"""Options of programs that run a model through the generation engine, and what they make."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import ConfigError
from tools.options import memory_size, positive

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser, *, or_checkpoint: bool = False) -> None:
    """Which model, where and in which precision. `or_checkpoint`: or --load, a checkpoint of this project."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True) if or_checkpoint else group
    which.add_argument(
        "--model",
        type=Path,
        required=not or_checkpoint,
        metavar="FOLDER",
        help="Hugging Face folder of a model",
    )
    if or_checkpoint:
        which.add_argument(
            "--load", type=Path, metavar="DIR", help="directory of checkpoints, or one checkpoint"
        )
    group.add_argument(
        "--dtype", choices=DTYPES, help="of weights, activations and cache (default: the folder's)"
    )
    group.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")


def add_engine_options(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """How the engine uses memory and how it reads prompts."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="of the KV cache, such as 16GiB (default: for a full batch)",
    )
    group.add_argument(
        "--page-size", type=positive, default=16, metavar="N", help="slots per page (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        metavar="N",
        help="most sequences at once (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-chunk",
        type=positive,
        default=512,
        metavar="N",
        help="prompt tokens that are run at once (default: %(default)s)",
    )
    prefill = group.add_mutually_exclusive_group()
    prefill.add_argument(
        "--prefill-tolerance",
        type=float,
        metavar="X",
        help="of maps that iterate: the relative change of shared keys and values at which passes over a prompt end; 0: all passes of "
        "training (default: 0.05)",
    )
    prefill.add_argument(
        "--exact",
        action="store_true",
        help="run prompts token by token: exact for maps that iterate, and slow",
    )


def placement(options: argparse.Namespace) -> "tuple[torch.device, torch.dtype | None]":
    """Where the model shall be and in which precision (None: its own). Raises ConfigError for a device that
    there is not."""
    import torch

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device is {options.device}: {str(error).partition(chr(10))[0]}") from error
    return device, None if options.dtype is None else getattr(torch, options.dtype)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, ready for inference, and its tokenizer. Raises ConfigError."""
    from lckv.generation.loading import load_model

    device, dtype = placement(options)
    try:
        model, tokenizer = load_model(options.model, dtype=dtype, device=device)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:  # memory of the device
        raise ConfigError(f"--model {options.model} cannot be loaded: {error}") from error
    if tokenizer is None:
        raise ConfigError(f"--model {options.model} has no tokenizer; put its files into the folder.")
    return model, tokenizer


def build_engine(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    *,
    max_waiting: int = 1024,
    max_prompt_tokens: int | None = None,
) -> Any:
    """An engine with the cache that was asked for. Raises ConfigError where memory does not suffice."""
    from lckv.generation.engine import Engine
    from lckv.generation.prefill import DEFAULT_TOLERANCE

    tolerance = options.prefill_tolerance
    try:
        return Engine(
            model,
            tokenizer=tokenizer,
            memory_bytes=options.memory,
            page_size=options.page_size,
            max_batch_size=options.batch_size,
            max_waiting=max_waiting,
            max_prompt_tokens=max_prompt_tokens,
            prefill_chunk=options.prefill_chunk,
            prefill="exact" if options.exact else "parallel",
            prefill_tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the cache cannot be made: {error}") from error

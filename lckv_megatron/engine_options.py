"""Options of programs that run a model through the generation engine, and what they make."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv.generation.config import EngineConfig
from lckv.weights.folder_kind import require_huggingface
from megatron_ext.arguments import memory_size, positive
from megatron_ext.errors import ConfigError
from megatron_ext.settings import settings_of

if TYPE_CHECKING:
    import torch

    from lckv.models.configuration_lckv_llama import LCKVLlamaConfig

DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(
    parser: argparse.ArgumentParser, *, or_checkpoint: bool = False, several: bool = False
) -> None:
    """Which model, where and in which precision. `or_checkpoint`: or --load, a checkpoint of this project;
    `several`: a list of models."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True) if or_checkpoint else group
    which.add_argument(
        "--model",
        type=Path,
        nargs="+" if several else None,
        required=not or_checkpoint,
        metavar="FOLDER",
        help="Hugging Face folder of a model" + (", or several folders" if several else ""),
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
    """How the engine uses memory and how it reads prompts; the texts are those of `EngineConfig`."""
    group = parser.add_argument_group("cache")
    add_setting(group, "--memory", "memory_bytes", type=memory_size, metavar="SIZE")
    add_setting(group, "--page-size", "page_size")
    add_setting(group, "--batch-size", "max_batch_size", default=batch_size)
    add_setting(group, "--context-tokens", "max_tokens", dest="context_tokens")
    add_setting(group, "--prefill-chunk", "prefill_chunk")
    group.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute every prompt from its first token on, also where an earlier request began alike",
    )
    (of_graphs,) = settings_of(EngineConfig)["cuda_graphs"]
    group.add_argument("--cuda-graphs", action="store_true", help=of_graphs.text)
    prefill = group.add_mutually_exclusive_group()
    add_setting(prefill, "--prefill-tolerance", "prefill_tolerance", type=float, metavar="X")
    prefill.add_argument(
        "--exact",
        dest="prefill",
        action="store_const",
        const="exact",
        default=EngineConfig.prefill,
        help="run prompts token by token: exact for maps that iterate, and slow",
    )


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Whether tokens of answers are guessed ahead, of programs that write answers."""
    group = parser.add_argument_group("speculative decoding")
    add_setting(
        group,
        "--speculation",
        "speculation",
        type=str,
        choices=("none", "prompt_lookup"),
        metavar=None,
    )
    add_setting(group, "--speculation-tokens", "speculation_tokens")
    add_setting(group, "--speculation-match", "speculation_match")


def add_setting(group: Any, option: str, field: str, *, config: type = EngineConfig, **settings: Any) -> None:
    """The option that sets a field of a dataclass. `group`: where it is listed; `settings`: of add_argument,
    where they differ from those of a count."""
    (setting,) = settings_of(config)[field]
    default = settings.pop("default", setting.default)
    text = setting.text if default is None else f"{setting.text} (default: {default})"
    chosen = {"type": positive, "metavar": "N", "default": default, "dest": field, "help": text, **settings}
    group.add_argument(option, **chosen)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """What the options of `add_engine_options` say, and those of `add_speculation_options` where they are
    there; other settings have their defaults."""
    speculation = ("speculation", "speculation_tokens", "speculation_match")
    return EngineConfig(
        **{name: getattr(options, name) for name in speculation if hasattr(options, name)},
        memory_bytes=options.memory_bytes,
        page_size=options.page_size,
        max_batch_size=options.max_batch_size,
        max_tokens=options.context_tokens,
        prefix_cache=options.prefix_cache,
        prefill_chunk=options.prefill_chunk,
        prefill=options.prefill,
        prefill_tolerance=options.prefill_tolerance,
        cuda_graphs=options.cuda_graphs,
    )


def served_context(options: argparse.Namespace, config: "LCKVLlamaConfig") -> int:
    """Tokens of the longest text that an engine with these options takes of a model."""
    return options.context_tokens or config.max_position_embeddings


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


def check_folders(folders: Sequence[Path]) -> None:
    """Raises ConfigError for the first that is no folder of a Hugging Face model, before torch is loaded."""
    for folder in folders:
        try:
            require_huggingface(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error


def load(options: argparse.Namespace, folder: Path | None = None) -> tuple[Any, Any]:
    """The model in `folder` (default: that of --model), ready for inference, and its tokenizer. Raises
    ConfigError."""
    folder = folder or options.model
    check_folders([folder])
    from lckv.generation.loading import load_model

    device, dtype = placement(options)
    try:
        model, tokenizer = load_model(folder, dtype=dtype, device=device)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:  # memory of the device
        raise ConfigError(f"--model {folder} cannot be loaded: {error}") from error
    if tokenizer is None:
        raise ConfigError(f"--model {folder} has no tokenizer; put its files into the folder.")
    return model, tokenizer


def check_models(folders: Sequence[Path]) -> None:
    """Looks at the configs of models before the first one is loaded. Raises ConfigError."""
    check_folders(folders)
    from lckv.generation.loading import model_config

    for folder in folders:
        try:
            model_config(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error


def build_engine(config: EngineConfig, model: Any, tokenizer: Any) -> Any:
    """An engine with the cache that was asked for. Raises ConfigError where memory does not suffice, and for
    texts longer than the model's context."""
    from lckv.generation.engine import Engine

    longest = model.config.longest_context
    if config.max_tokens is not None and config.max_tokens > longest:
        raise ConfigError(
            f"--context-tokens is {config.max_tokens}; it must be at most the model's longest context, "
            f"{longest} tokens."
        )
    try:
        return Engine(model, config, tokenizer=tokenizer)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the cache cannot be made: {error}") from error

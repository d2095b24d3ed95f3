"""From YAML files and command-line options to a `RunConfig`, and back to plain dictionaries and YAML.

Every field of the configuration is one option, `--section.key VALUE`, explained by its docstring.
"""

import argparse
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import yaml

from megatron_ext.arguments import DashedParser
from megatron_ext.atomic import write_file
from megatron_ext.config import RunConfig
from megatron_ext.console import let_first_rank_speak
from megatron_ext.errors import ConfigError
from megatron_ext.last_word import say_last
from megatron_ext.settings import describe_settings, is_texts, read, settings_of, unknown_message
from megatron_ext.text_yaml import load_text_yaml, read_text_yaml


def _parser() -> argparse.ArgumentParser:
    """Takes every setting as a text."""
    parser = DashedParser(
        description=(
            "A run is described by YAML files, the later ones winning, and by options, which win over files."
        ),
        usage="%(prog)s [--config FILE ...] [--print-config] [--section.key VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file; may be repeated.")
    parser.add_argument("--print-config", action="store_true", help="Show the run as YAML and exit.")
    for key, settings in settings_of(RunConfig).items():
        many = all(is_texts(setting.type) for setting in settings)
        parser.add_argument(f"--{key}", nargs="+" if many else None, help=argparse.SUPPRESS)
    return parser


def parse_run_config(argv: Sequence[str] | None = None) -> RunConfig:
    """The run that `argv` (default: the program's arguments) and the YAML files named in it describe.

    `--help` and `--print-config` print and exit.
    A wrong option or file ends the program with status 2 and one message.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(f"{_parser().format_help()}\n{describe_settings(RunConfig)}")
        raise SystemExit(0)
    try:
        options = _parse_options(argv)
        files: Any = options.pop("config", [])
        shown = options.pop("print_config", False)
        trees = ((f"{path}: ", read_text_yaml(Path(path), f"--config {path}")) for path in files)
        run = read(RunConfig, [*trees, ("", options)])
    except ConfigError as error:
        exit_with(str(error))
    if shown:
        sys.stdout.write(_to_yaml(run))
        raise SystemExit(0)
    return run


def _parse_options(argv: Sequence[str]) -> dict[str, object]:
    """The values of --config, --print-config and the settings in `argv`,
    by their names; raises ConfigError."""
    try:
        given, rest = _parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    unknown = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    if unknown:
        raise ConfigError("\n".join(unknown_message(RunConfig, name) for name in unknown))
    if rest:
        raise ConfigError(
            f"unrecognized arguments: {' '.join(rest)}; settings are given as --section.key VALUE."
        )
    return {
        key: None if value == "null" and _may_be_null(key) else value
        for key, value in ((key, _as_given(key, value)) for key, value in vars(given).items())
    }


def _as_given(key: str, value: Any) -> object:
    """The words behind an option as one text, or as a list where they are several and the shell has not
    split a list in brackets."""
    if not isinstance(value, list) or key == "config":
        return value
    return " ".join(value) if len(value) == 1 or value[0].startswith("[") else value


def _may_be_null(key: str) -> bool:
    return any(NoneType in typing.get_args(setting.type) for setting in settings_of(RunConfig).get(key, ()))


def exit_with(message: str) -> NoReturn:
    """End the program with status 2 and `message` on stderr, said by one process of a torchrun group only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"error: {message}\n")
        say_last(f"error: {message}")
    else:
        let_first_rank_speak()
    raise SystemExit(2)


def config_to_dict(run: RunConfig) -> dict[str, Any]:
    """Sections as nested dictionaries of texts, numbers, booleans, lists and None: fit for JSON and YAML."""
    return asdict(
        run, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def config_from_dict(sections: Mapping[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict`; fields left out have their defaults.
    Raises ConfigError naming all misfits."""
    return read(RunConfig, [("", sections)])


def _to_yaml(run: RunConfig) -> str:
    return yaml.safe_dump(config_to_dict(run), sort_keys=False, allow_unicode=True)


def save_config(run: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write `run` as YAML, in full or not at all;
    raises OSError, or ValueError where it would read back differently."""
    text = _to_yaml(run)
    if config_from_dict(load_text_yaml(text)) != run:
        raise ValueError(f"{path} is not written: this configuration would be read back differently:\n{text}")
    write_file(Path(path), text.encode())

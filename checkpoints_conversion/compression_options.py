"""The settings of a model's sharing map and KV policy that a conversion can change,
as options of the command line."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import get_args

from lckv.config import CompressionConfig
from megatron_ext.settings import read, settings_of


@dataclass(frozen=True)
class CompressionSection:
    """The section `compression` of a run."""

    compression: CompressionConfig = field(default_factory=CompressionConfig)


def add_compression_options(parser: argparse.ArgumentParser) -> None:
    """One option `--compression.FIELD` for each setting;
    those given are in the parsed namespace, the others are not."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key, settings in settings_of(CompressionSection).items():
        group = settings[0].group
        if group not in groups:
            groups[group] = parser.add_argument_group(group.replace("%", "%%"))
        meanings = " Or: ".join(dict.fromkeys(setting.text for setting in settings))
        text = f"{meanings} (not given: as in the model)".replace("%", "%%")
        groups[group].add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=text)


def given_changes(options: argparse.Namespace) -> dict[str, object]:
    """The settings given, texts by keys, null as None where a setting can be nothing."""
    known = settings_of(CompressionSection)
    return {
        key: None
        if value == "null" and any(NoneType in get_args(setting.type) for setting in known[key])
        else value
        for key, value in vars(options).items()
        if key in known
    }


def changed_compression(before: CompressionConfig, changes: Mapping[str, object]) -> CompressionConfig:
    """`before` with the settings `changes`, by keys such as compression.layer_types. Raises ConfigError
    naming all that is wrong."""
    given = asdict(before)
    if changes.get("compression.policy.name", given["policy"]["name"]) != given["policy"]["name"]:
        del given["policy"]
    return read(CompressionSection, [("", {"compression": given}), ("", changes)]).compression

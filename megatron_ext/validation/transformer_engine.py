"""What a setting needs of Transformer Engine, said where it is missing: one sentence each."""

import importlib.metadata
from collections.abc import Iterator

from packaging.version import Version

from megatron_ext.config import RunConfig

# Torch is imported below only: whoever asks for none of this gets the answer in milliseconds.


def needs_transformer_engine(setting: str) -> Iterator[str]:
    """Nothing where `setting` can use Transformer Engine on this machine."""
    from megatron_ext.model.implementation import obstacle_to_transformer_engine

    if obstacle := obstacle_to_transformer_engine():
        yield f"{setting}, but {obstacle}. Leave the setting at its default, or provide what is missing."


def needs_layers(setting: str, run: RunConfig) -> Iterator[str]:
    """Nothing where the layers of `run`, which `setting` needs, are Transformer Engine's."""
    if run.model.transformer_impl == "local":
        yield (
            f"{setting} and model.transformer_impl is local; the former needs Transformer Engine's layers: "
            "set the latter to auto."
        )
    if run.train.precision == "fp32":
        yield (
            f"{setting} and train.precision is fp32, for which Transformer Engine's layers are not used: set "
            "the latter to bf16."
        )
    yield from needs_transformer_engine(setting)


def needs_version(setting: str, least: str) -> Iterator[str]:
    """Nothing where Transformer Engine is `least` or newer, or is missing: that is said elsewhere."""
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return
    if Version(version) < Version(least):
        yield (
            f"{setting}, which needs Transformer Engine {least}, and {version} is installed: install a newer "
            "one, or leave the setting at its default."
        )

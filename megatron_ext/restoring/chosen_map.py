"""Which map a trained model runs with. Neither torch nor Megatron is loaded."""

from pathlib import Path

from lckv.config import CompressionConfig
from lckv.errors import SettingError
from megatron_ext.errors import ConfigError


def chosen_map(
    path: Path, compression: CompressionConfig, num_layers: int, layer_types: str | None
) -> CompressionConfig:
    """The settings `compression` of the model at `path` with the map `layer_types`, of --layer-types. Raises
    ConfigError where that is not one of its maps, or where it has several and none is asked for."""
    try:
        return compression.chosen(layer_types, num_layers)
    except SettingError as error:
        family = compression.family(num_layers)
        if layer_types is None:
            raise ConfigError(
                f"{path} was trained with a family of maps, {family}, so that it must be said which one is "
                f"meant: give --layer-types MAP, such as {family.first}. (For a run that goes on, or a "
                "teacher, with one map alone: lckv-megatron convert megatron-to-hf --layer-types MAP, then "
                "hf-to-megatron.)"
            ) from error
        reasons = (f"{problem.value}; {problem.obstacle}" for problem in error.problems)
        raise ConfigError(f"--layer-types is {'; '.join(reasons)} ({path}).") from error

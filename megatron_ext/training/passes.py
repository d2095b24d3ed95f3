"""Which map, and how many passes without gradient, each step of a run has."""

from dataclasses import replace

from lckv.config import CompressionConfig
from lckv.sharing.family import LayerTypesFamily
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.pass_schedule import forward_passes_at
from megatron_ext.config import TrainConfig

_ALL_EVALUATED = 4
"""Maps of a family up to which an evaluation looks at all."""


def compression_of_step(
    compression: CompressionConfig, train: TrainConfig, num_layers: int, iteration: int
) -> CompressionConfig:
    """The map and m of the step after `iteration` steps; the same on every rank, and in a run that goes
    on."""
    passes = forward_passes_at(
        train.forward_passes_schedule,
        train.least_forward_passes,
        compression.forward_passes,
        iteration=iteration,
        iterations=train.train_iters,
        seed=train.seed,
    )
    family = compression.family(num_layers)
    if family.only is None:
        compression = compression.with_map(family.draw(train.seed, iteration))
    return replace(compression, forward_passes=passes)


def evaluated_maps(family: LayerTypesFamily, train: TrainConfig) -> tuple[LayerTypes, ...]:
    """The maps with which the model is evaluated, the one that counts first. Raises SettingError where
    train.eval_layer_types has no maps of so many layers."""
    if train.eval_layer_types:
        return tuple(LayerTypes.parse(text, len(family)) for text in train.eval_layer_types)
    few = family.is_enumerated and len(family.weights) <= _ALL_EVALUATED
    return tuple(family.weights) if few else (family.first,)

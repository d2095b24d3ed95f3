"""A plain model's weights as those of a model whose layers share keys and values: by copy or by average,
nothing read in advance; or fitted to a text (`fitted_map.py`).

The rule is lckv/sharing/initialization.py's. A layer that only reads keeps its queries; what computed its own
keys and values goes into the layer that it reads (average), or is dropped (copy).
"""

import logging
from dataclasses import replace

from torch import Tensor

from checkpoints_conversion.added_weights import with_mix_weights, with_policy_weights
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.first_guess import with_first_guess
from checkpoints_conversion.fitted_map import fitted_source
from checkpoints_conversion.shared_map import SharedMapSource
from lckv.config import CompressionConfig
from lckv.sharing.doubts import doubts
from lckv.sharing.family import LayerTypesFamily
from lckv.sharing.initialization import Initialization
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw
from lckv.weights.tensors import TensorSource
from megatron_ext.validation.layout import compression_problems

logger = logging.getLogger(__name__)


def initialize(
    source: TensorSource,
    description: ModelDescription,
    compression: CompressionConfig,
    how: Initialization,
    tokens: Tensor | None = None,
) -> tuple[TensorSource, ModelDescription, Initialization | None]:
    """The weights `source` of the model `description` for the same model with `compression`, its description,
    and how its keys and values were made: None where no sharing is new. Of a family of maps that
    is "copy": its layers have their own.

    A map can be given to a model whose layers all read their own keys and values, and a KV policy, where it
    has no obstacle, to one that keeps every token. A model that has a map or a policy already keeps it; how
    often its plan iterates, and from which first guess, may change. Layers that mix keys and values of others
    into their own begin as if they did not. `tokens`, int64 [b, T], are those that "svd" fits on. A plain
    model can also be given a family of maps, for training. Raises ConversionError.
    """
    layers = description.model.num_layers
    if problems := [*compression_problems(compression, layers)]:
        raise ConversionError("\n".join(problems))
    _check_policy(description, compression)
    family = compression.family(layers)
    old, new = description.compression.map(layers), family.stored
    if family.only is None:
        _check_family(family, old, how)
    changed = replace(description, compression=compression)
    source = with_first_guess(source, description, compression)
    source = with_policy_weights(source, description, compression)
    if not old.is_plain:
        _check_same_map(description.compression, compression, old, new)
        _check_fits_nothing(tokens, new)
        return source, changed, None
    source = with_mix_weights(source, description, compression)
    if new.kv_layers == old.kv_layers and all(layer.source == layer.index for layer in new):
        _check_fits_nothing(tokens, new)
        return source, changed, None if family.only else "copy"
    if sentences := [*doubts(new)]:
        logger.warning("%s\n%s", draw(new, window=compression.sliding_window), "\n".join(sentences))
    projection = compression.policy.traits.projection
    if how != "svd":
        return SharedMapSource(source, description.model, new, how, projection), changed, how
    if tokens is None:
        raise ConversionError(
            "--init is svd, which fits keys and values to what the model computes on a text, but there is no "
            "text: give --calibration-text, or take --init average or --init copy."
        )
    copied = SharedMapSource(source, description.model, new, "copy")
    return fitted_source(source, copied, description, compression, tokens), changed, how


def _check_fits_nothing(tokens: Tensor | None, layer_types: LayerTypes) -> None:
    if tokens is not None:
        raise ConversionError(
            f"--calibration-text is given, but compression.layer_types {layer_types} makes no new sharing of "
            "keys and values, so that nothing is fitted: leave it and --init out, or give a sharing map."
        )


def _check_family(family: LayerTypesFamily, old: LayerTypes, how: Initialization) -> None:
    """For a family of maps: all weights are copied, those for keys and values of layers that compute them in
    some map."""
    if old != LayerTypes.plain(len(old)):
        raise ConversionError(
            f"compression.layer_types is a family of maps, {family}, which cannot be made from this model: "
            f"its map is {old}, and a family starts from a model of which every layer reads its own keys and "
            "values, without a window. Start from a plain model."
        )
    if how == "svd":
        raise ConversionError(
            "--init is svd, which fits keys and values to one map, and compression.layer_types is a "
            f"family of maps, {family}: give --init copy, or one map."
        )
    if how != "copy" and family.stored.kv_layers != old.kv_layers:
        without = sorted(set(old.kv_layers) - set(family.stored.kv_layers))
        raise ConversionError(
            f"--init is {how} and compression.layer_types is a family of maps, {family}, in which layers "
            f"{', '.join(map(str, without))} never compute keys and values; who reads in their place depends "
            "on the map: give --init copy, which leaves their weights out."
        )


def _check_same_map(
    before: CompressionConfig, after: CompressionConfig, old: LayerTypes, new: LayerTypes
) -> None:
    kept = ("sliding_window", "force_nodiag", "mix_scaling_factor")
    if old == new and all(getattr(before, name) == getattr(after, name) for name in kept):
        return
    if old == new and before.mix_scaling_factor != after.mix_scaling_factor:
        raise ConversionError(
            f"compression.mix_scaling_factor is {after.mix_scaling_factor}, but the model's weights that mix "
            f"keys and values belong to {before.mix_scaling_factor}: leave it out."
        )
    raise ConversionError(
        f"compression.layer_types {new} (sliding_window {after.sliding_window}, force_nodiag "
        f"{after.force_nodiag}) cannot be made from this model: it shares keys and values already ({old}, "
        f"sliding_window {before.sliding_window}, force_nodiag {before.force_nodiag}), and layers that only "
        "read have no weights for their own. Leave these settings out to convert the model as it is, or "
        "start from a plain model."
    )


def _check_policy(description: ModelDescription, compression: CompressionConfig) -> None:
    before, after = description.compression.policy, compression.policy
    if before == after:
        return
    if before != CompressionConfig().policy:
        raise ConversionError(
            f"compression.policy is {after} but the model was trained with {before}; a conversion keeps the "
            "policy. Leave compression.policy out; a new stage starts in training, with checkpoint.finetune."
        )
    obstacle = after.obstacle_to_converting(before)
    if obstacle is not None:
        raise ConversionError(f"compression.policy is {after.name}: {obstacle}.")

"""What cannot work in a training of a family of sharing maps. Torch is not loaded."""

from collections.abc import Iterator

from lckv.errors import SettingError
from lckv.sharing.layer_types import LayerTypes
from megatron_ext.config import RunConfig

_NAME = "train.eval_layer_types"


def evaluated_map_problems(run: RunConfig) -> Iterator[str]:
    """Maps of an evaluation that are none of the family, one sentence each."""
    asked, layers = run.train.eval_layer_types, run.model.num_layers
    if not asked or run.compression.problems(layers):
        return  # said elsewhere
    family = run.compression.family(layers)
    if family.only is not None:
        yield (
            f"{_NAME} is {', '.join(asked)} and compression.layer_types is {family}, one map, with which the "
            "model is evaluated anyway: leave the former out."
        )
        return
    if run.train.eval_interval <= 0:
        yield (
            f"{_NAME} is {', '.join(asked)} and train.eval_interval is {run.train.eval_interval}, so that "
            "nothing is evaluated: set the latter, or leave the former out."
        )
    seen = set[LayerTypes]()
    for text in asked:
        try:
            layer_types = LayerTypes.parse(text, layers)
        except SettingError as error:
            yield from (f"{_NAME} has {problem.value}; {problem.obstacle}." for problem in error.problems)
            continue
        if layer_types not in family:
            yield (
                f"{_NAME} has {text}, which is no map of compression.layer_types, {family}: give one that is."
            )
        if layer_types in seen:
            yield f"{_NAME} has {layer_types} more than once: leave one."
        seen.add(layer_types)

"""Fields of a Hugging Face config that change nothing, as transformers itself knows them.

transformers is imported only when a config has a field that the families do not declare.
"""

from collections.abc import Mapping
from functools import cache


@cache
def base_fields() -> frozenset[str]:
    """Fields that every config of transformers may have, whatever the model: those of its base class, and how
    text is sampled, which the base class of transformers 4 had too."""
    from transformers import GenerationConfig, PreTrainedConfig

    return frozenset({*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()})


@cache
def class_defaults(model_type: str) -> Mapping[str, object]:
    """The fields of transformers' config class for `model_type`, with their defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]().to_dict()


def is_harmless(name: str, value: object, model_type: str) -> bool:
    """Whether the field `name` of a config changes nothing: it is null, or belongs to the base class, or has
    the default of the class for `model_type`."""
    if value is None or name in base_fields():
        return True
    defaults = class_defaults(model_type)
    return name in defaults and defaults[name] == value

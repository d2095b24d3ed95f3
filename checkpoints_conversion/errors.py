"""The error of conversions."""

from lckv.errors import ModelError
from megatron_ext.errors import ConfigError


class ConversionError(ConfigError, ModelError):
    """A model that cannot be converted: the message says which file, field or tensor,
    what is wrong and the way out."""

"""Which attention backend a run's model.attention_backend means."""

import torch

from lckv.attention.backends import Choice, choose
from lckv.errors import UnsupportedError
from megatron_ext.errors import ConfigError


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The backend for model.attention_backend `name` and such tensors.
    Raises ConfigError where it cannot serve."""
    try:
        return choose(name, device=device, dtype=dtype, head_dim=head_dim)
    except UnsupportedError as error:
        raise ConfigError(
            f"model.attention_backend is {name}, but {error.obstacle}. Set model.attention_backend to auto "
            f"or sdpa."
        ) from error

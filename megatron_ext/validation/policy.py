"""What a model cannot do under its KV policy. What is wrong with the policy's settings by themselves, it says
itself."""

from collections.abc import Iterator

from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ModelConfig

_LARGEST_CUDA_HEAD = 256


def policy_problems(model: ModelConfig, policy: DenseConfig | DMCConfig, precision: str) -> Iterator[str]:
    """Settings of `model`, trained in train.precision `precision`, that cannot work under `policy`."""
    if isinstance(policy, DMCConfig):
        yield from _dmc(model, policy, precision)


def _dmc(model: ModelConfig, policy: DMCConfig, precision: str) -> Iterator[str]:
    name = "model.kv_channels" if model.kv_channels else "model.hidden_size / model.num_attention_heads"
    size = _head_size(model)
    if size == 2:
        yield (
            f"{name} is 2 and compression.policy.name is dmc; it must be at least 4, because the last "
            "channel of queries and "
            "keys is that of the decisions."
        )
    if policy.stage == "zero_out":
        return
    merging = f"compression.policy.name is dmc and compression.policy.stage is {policy.stage}"
    if 0 < model.attention_dropout < 1:
        yield (
            f"model.attention_dropout is {model.attention_dropout}, {merging}; attention to merged tokens "
            "has no dropout: "
            "set model.attention_dropout to 0."
        )
    has_kernel = (
        size is None or size == 2 or model.attention_backend == "reference" or _fits_cuda(size, precision)
    )
    if not has_kernel and _has_cuda():
        yield (
            f"{name} is {size}, {merging}; on CUDA it must be a multiple of 8 and, in bf16, at most "
            f"{_LARGEST_CUDA_HEAD}: "
            "choose another size, or for small trials set model.attention_backend to reference."
        )


def _head_size(model: ModelConfig) -> int | None:
    """Channels of a head; None where they are refused anyway, with or without a policy."""
    heads = model.num_attention_heads
    if not model.kv_channels and (heads < 1 or model.hidden_size % heads):
        return None
    return model.head_dim if model.head_dim > 0 and model.head_dim % 2 == 0 else None


def _fits_cuda(size: int, precision: str) -> bool:
    """Whether the kernels of `lckv.attention.flash_pairs` for CUDA take heads of this size."""
    return size % 8 == 0 and (size <= _LARGEST_CUDA_HEAD or precision == "fp32")


def _has_cuda() -> bool:
    import torch  # here, so that usual settings are checked without it

    return torch.cuda.is_available()

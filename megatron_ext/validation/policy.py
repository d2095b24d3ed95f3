"""What a model cannot do under its KV policy.
What is wrong with the policy's settings by themselves, it says itself."""

from collections.abc import Iterator

from lckv.attention.head_sizes import obstacle_to_biased_keys
from lckv.policies.config import PolicyConfig, Traits
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.precision import Precision


def policy_layout_problems(policy: PolicyConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Layouts that cannot work under `policy`."""
    ranks = parallel.tensor_model_parallel_size
    if policy.traits.mixes_heads and ranks > 1:
        yield (
            f"parallel.tensor_model_parallel_size is {ranks} and compression.policy is {policy.describe()}; "
            "there KV heads go by the queries of another one, which another rank has: set the former to 1, "
            "or choose settings of the policy with which every KV head goes by its own."
        )


def trainable_problems(policy: PolicyConfig, train: TrainConfig) -> Iterator[str]:
    """What cannot be trained alone under `policy`."""
    if train.trainable == "policy" and policy.traits.projection is None:
        yield (
            f"train.trainable is policy, and compression.policy is {policy.describe()}, which has no "
            "parameters of its own: set the former to all, or choose settings of the policy with which it "
            "has some."
        )


def policy_problems(model: ModelConfig, policy: PolicyConfig, numbers: Precision) -> Iterator[str]:
    """Settings of `model`, trained in the precision `numbers`, that cannot work under `policy`."""
    name = "model.kv_channels" if model.kv_channels else "model.hidden_size / model.num_attention_heads"
    size, traits = _head_size(model), policy.traits
    if size is not None and size < traits.min_head_dim:
        yield (
            f"{name} is {size} and compression.policy.name is {policy.name}; under this policy it must be at "
            f"least {traits.min_head_dim}."
        )
        return
    stage = "" if policy.stage is None else f" and compression.policy.stage is {policy.stage}"
    chosen = f"compression.policy.name is {policy.name}{stage}"
    if 0 < model.attention_dropout < 1 and not traits.dropout:
        yield (
            f"model.attention_dropout is {model.attention_dropout}, {chosen}; attention under this policy "
            "has no dropout: set model.attention_dropout to 0."
        )
    if size is not None and model.attention_backend != "reference":
        obstacle = _obstacle_on_cuda(size, traits, numbers)
        if obstacle is not None and _has_cuda():
            yield (
                f"{name} is {size}, {chosen}; {obstacle}: choose another size, or for small trials set "
                "model.attention_backend to reference."
            )


def _head_size(model: ModelConfig) -> int | None:
    """Channels of a head; None where they are refused anyway, with or without a policy."""
    heads = model.num_attention_heads
    if not model.kv_channels and (heads < 1 or model.hidden_size % heads):
        return None
    return model.head_dim if model.head_dim > 0 and model.head_dim % 2 == 0 else None


def _obstacle_on_cuda(size: int, traits: Traits, numbers: Precision) -> str | None:
    """What keeps attention to keys with a bias from taking heads of this size on CUDA."""
    if traits.key_bias is None:
        return None
    return obstacle_to_biased_keys(size + traits.extra_channels, float32=not numbers.is_bf16)


def _has_cuda() -> bool:
    import torch  # here, so that usual settings are checked without it

    return torch.cuda.is_available()

"""Models for benchmarks of inference: those of Hugging Face folders, and models with random weights of any
size, map and policy.

Time and memory do not depend on weights, but for what a KV policy drops: the decisions of a random model are
scripted, so that it has as many tokens per slot as the policy's settings aim at.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lckv.config import CompressionConfig
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.config import PolicyConfig
from lckv_megatron.layouts import LAYOUTS
from lckv_megatron.measuring.subjects import random_tokens
from megatron_ext.errors import ConfigError
from tools.benchmarks.policies import policy_of

_CALIBRATION_TOKENS = 512


@dataclass(frozen=True)
class Sizes:
    """Of models with random weights."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    sliding_window: int
    """Of maps with windows, in tokens."""
    context: int
    """Tokens of the longest sequence."""

    @property
    def ffn_size(self) -> int:
        """Width of the MLP."""
        return -(-self.hidden_size * 8 // 3 // 16) * 16


def transformers_llama(sizes: Sizes) -> nn.Module:
    """transformers' own LlamaForCausalLM of these sizes, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.context,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class RandomModel:
    """What is asked of a model with random weights."""

    name: str
    layout: str
    """The name of a layout (tools/layouts.py), or a sharing map."""
    policy: PolicyConfig

    @classmethod
    def parse(cls, text: str) -> "RandomModel":
        """From NAME=MAP or NAME=MAP,POLICY (see `policy_of`);
        without NAME= the name is the map. Raises ValueError."""
        description, comma, policy = text.partition(",")
        name, equals, layout = description.partition("=")
        return cls(
            name, layout if equals else name, policy_of(policy) if comma else CompressionConfig().policy
        )

    def build(self, sizes: Sizes, *, dtype: torch.dtype, device: torch.device) -> LCKVLlamaForCausalLM:
        """The model, always the same. Raises ConfigError for what does not fit together."""
        torch.manual_seed(0)
        try:
            model = LCKVLlamaForCausalLM(self._config(sizes)).eval()
        except ValueError as error:
            raise ConfigError(f"--random {self.name}: {error}") from error
        # As in trained models, what layers make of a token hangs on the token above all, not on how many came
        # before.
        nn.init.normal_(model.model.embed_tokens.weight)
        if not self.policy.traits.keeps_every_token:
            script_decisions(model)
        return model.to(device, dtype)

    def _config(self, sizes: Sizes) -> LCKVLlamaConfig:
        known = {layout.name.split()[0].lower(): layout for layout in LAYOUTS}
        layout = known.get(self.layout.lower())
        layer_types = self.layout if layout is None else layout.layer_types(sizes.layers)
        compression: dict[str, Any] = {"layer_types": layer_types}
        if "s" in layer_types:
            compression["sliding_window"] = sizes.sliding_window
        compression["policy"] = asdict(CompressionConfig(policy=self.policy))["policy"]
        return LCKVLlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.ffn_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=sizes.context,
            qkv_bias=True,  # decisions are scripted there; the others have it so that all compute the same
            bos_token_id=None,
            eos_token_id=None,
            compression=compression,
        )


_Kind = Literal["query", "key", "projection"]


@torch.inference_mode()
def script_decisions(model: LCKVLlamaForCausalLM) -> None:
    """Set the biases of query and key projections, and of the policy's own, so that of random tokens there
    are as many for each slot as the KV policy aims at, from the bottom layer to the top, each on what the
    scripted ones below give it. The policy's own begins as zeros, and gets random weights."""
    config, kv_heads, policy = model.config, model.config.num_key_value_heads, model.model.policy
    assert kv_heads is not None

    def shift(kind: _Kind, projection: nn.Module, _: object, output: Tensor) -> Tensor:
        channels = 1 if kind == "projection" else config.head_dim
        heads = output.unflatten(-1, (-1, channels))  # [b, s, heads, d]
        added = policy.scripted_shift(kind, heads.transpose(0, 1), kv_heads)
        if added is None:
            return output
        assert isinstance(projection, nn.Linear)
        projection.bias.add_(added.flatten())
        return output + added.flatten()

    owners = [layer.self_attn for layer in model.model.layers if layer.self_attn.computes_kv]
    hooks = [owner.q_proj.register_forward_hook(partial(shift, "query")) for owner in owners]
    hooks += [owner.k_proj.register_forward_hook(partial(shift, "key")) for owner in owners]
    if (own := policy.traits.projection) is not None:
        for owner in owners:
            projection = getattr(owner, own.name)
            nn.init.normal_(projection.weight, std=config.initializer_range)
            hooks.append(projection.register_forward_hook(partial(shift, "projection")))
    model(
        random_tokens(config.vocab_size, 1, min(_CALIBRATION_TOKENS, config.max_position_embeddings)),
        use_cache=False,
    )
    for hook in hooks:
        hook.remove()

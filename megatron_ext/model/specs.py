"""Which modules a layer is built from: Megatron's local ones, or Transformer Engine's."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lckv.sharing.layer_types import LayerTypes
from megatron_ext.mcore import mlp
from megatron_ext.model.activation import SwiGLU
from megatron_ext.model.attention import SharedKVAttention
from megatron_ext.model.core_attention import CoreAttention
from megatron_ext.model.layer import SharedKVLayer
from megatron_ext.model.linear import QKVLinear
from megatron_ext.model.norm import RMSNorm


@dataclass(frozen=True)
class _Modules:
    """The classes that the two implementations exchange."""

    norm: type
    linear_qkv: type
    linear_fc1: type
    row_linear: type
    fused_norms: bool
    """Whether the linear layers behind a norm contain it."""


def _modules(implementation: str) -> _Modules:
    if implementation == "local":
        return _Modules(RMSNorm, QKVLinear, ColumnParallelLinear, RowParallelLinear, fused_norms=False)
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    fused = TELayerNormColumnParallelLinear
    return _Modules(TENorm, fused, fused, TERowParallelLinear, fused_norms=True)


def layer_spec(modules: _Modules, *, computes_kv: bool) -> ModuleSpec:
    """One layer. Checkpoint keys are the same for both implementations."""
    norm = IdentityOp if modules.fused_norms else modules.norm
    projection = "linear_qkv" if computes_kv else "linear_q"
    return ModuleSpec(
        module=SharedKVLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SharedKVAttention,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.linear_qkv,
                    core_attention=CoreAttention,
                    linear_proj=modules.row_linear,
                    q_layernorm=modules.norm,
                    k_layernorm=modules.norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp(
                MLPSubmodules(
                    linear_fc1=modules.linear_fc1, activation_func=SwiGLU, linear_fc2=modules.row_linear
                )
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={}
            if modules.fused_norms
            else {
                "input_layernorm.": f"self_attention.{projection}.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_submodules(
    layer_types: LayerTypes, layers: Sequence[int], implementation: str
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm."""
    modules = _modules(implementation)
    specs = [layer_spec(modules, computes_kv=index in layer_types.kv_layers) for index in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=modules.norm)

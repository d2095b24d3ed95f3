"""From the run's sections to Megatron's TransformerConfig."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerTypes
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.gpus import peak_tflops
from megatron_ext.model.implementation import accumulates_in_place, choose_implementation
from megatron_ext.model.offload_share import OffloadShare
from megatron_ext.model.operators import Operators, choose, choose_operators
from megatron_ext.model.placement import Placement, place
from megatron_ext.offload.share import OffloadSettings
from megatron_ext.precision import precision


@dataclass
class SharedKVTransformerConfig(TransformerConfig):
    """Megatron's TransformerConfig with the sharing map, so that every module built
    from a spec knows its layer's place."""

    compression: CompressionConfig = field(default_factory=CompressionConfig)
    """Sharing map or family of maps, passes, window and KV policy."""

    fp8_no_gradient: Literal["e4m3", "hybrid"] | None = None
    """As Megatron's `fp8`, for passes without gradient alone; `fp8` is for all passes."""

    attention_kernel: str = "auto"
    """model.attention_backend: the backend of lckv.attention
    (Megatron's `attention_backend` is Transformer Engine's)."""

    operators: Operators = field(
        default_factory=partial(choose, "torch", device=torch.device("cpu"), widest=0)
    )
    """What computes RMSNorm, SwiGLU and RoPE: model.operator_backend."""

    sends_keys_round: bool = False
    """See `ParallelConfig.sends_keys_round`."""

    placement: Placement | None = None
    """The layers of each pipeline stage; see `placed`."""

    pipeline_in_flight: int | None = None
    """parallel.pipeline_in_flight."""

    offload: OffloadSettings | None = None
    """train.activation_offload; None: activations stay on the device."""

    @property
    def placed(self) -> Placement:
        """The layers of each pipeline stage, which `transformer_config` sets."""
        assert self.placement is not None
        return self.placement

    @property
    def layer_types(self) -> LayerTypes:
        """The sharing map; of a family one in which those layers compute keys and values that have weights
        for them."""
        return self.compression.family(self.num_layers).stored


def transformer_config(
    model: ModelConfig,
    compression: CompressionConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    *,
    vocab_size: int,
) -> SharedKVTransformerConfig:
    """Megatron's configuration of the model, for the machine at hand (fused kernels only with CUDA)."""
    placement = place(model, compression, parallel, vocab_size=vocab_size, seq_length=train.seq_length)
    cuda = torch.cuda.is_available()
    numbers = precision(train.precision)
    granularity = None if train.recompute_granularity == "none" else train.recompute_granularity
    full = granularity == "full"
    layers = choose_implementation(model.transformer_impl, train.precision)
    offloads = train.activation_offload == "token_wise"
    share = OffloadShare(model, compression, parallel, train, placement) if offloads else None
    return SharedKVTransformerConfig(
        compression=compression,
        attention_kernel=model.attention_backend,
        operators=choose_operators(model, parallel),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method=_keep,
        output_layer_init_method=_keep,
        embedding_init_method=_keep,
        init_method_std=model.init_method_std,
        use_cpu_initialization=not cuda,
        params_dtype=numbers.dtype,
        pipeline_dtype=numbers.dtype,
        bf16=numbers.is_bf16,
        fp8=model.fp8 if model.fp8_passes == "all" else None,
        fp8_no_gradient=model.fp8 if model.fp8_passes == "no_gradient" else None,
        fp8_recipe=model.fp8_recipe,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sends_keys_round=parallel.sends_keys_round,
        placement=placement,
        offload=share.settings(device_peak_tflops(train.precision)) if share else None,
        pipeline_in_flight=parallel.pipeline_in_flight,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        tp_comm_overlap_ag=parallel.tp_comm_overlap_ag,
        tp_comm_overlap_rs=parallel.tp_comm_overlap_rs,
        tp_comm_overlap_rs_dgrad=parallel.tp_comm_overlap_rs_dgrad,
        tp_comm_bulk_dgrad=parallel.tp_comm_bulk_dgrad,
        tp_comm_bulk_wgrad=parallel.tp_comm_bulk_wgrad,
        tp_comm_bootstrap_backend=parallel.tp_comm_bootstrap_backend,
        deterministic_mode=train.deterministic and cuda,
        recompute_granularity=granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        recompute_modules=list(train.recompute_modules) if granularity == "selective" else None,
        bias_dropout_fusion=cuda,
        use_te_activation_func=True,  # the MLP calls the activation that `specs.py` gives it
        masked_softmax_fusion=False,
        # Fused sums are asked for through attributes of the weight, which tensors that come back from hooks
        # have not.
        gradient_accumulation_fusion=accumulates_in_place(layers.name) and not offloads,
        # Without it Megatron tells Transformer Engine's layers which forward pass is the first, and the
        # backward of that one overwrites the gradient: a cyclic group uses a weight in several passes.
        disable_parameter_transpose_cache=True,
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        deallocate_pipeline_outputs=True,
    )


def device_peak_tflops(precision: str) -> float | None:
    """Of this machine's GPU, 10^12 operations per second; None without one, or where it is not known."""
    return peak_tflops(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None


def _keep(weight: torch.Tensor) -> None:
    """Megatron's modules leave their weights alone;
    `initialization.py` sets them, independently of the layout."""

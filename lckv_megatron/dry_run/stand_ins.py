"""What the kernels of a GPU keep and move, in place of those of the CPU.

The CPU's kernels keep more than a GPU's: the norm its input in float32, grouped attention its keys and values
repeated. Here are, as shapes:
- attention as flash-attn does it, windows inside of the kernel, grouped heads as they are;
- RMSNorm as one kernel, which keeps its input and one number per token;
- SwiGLU as one kernel, which keeps its input;
- products of bfloat16 that leave their kernel in float32;
- what the KV policy runs as one kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.transformer import mlp
from torch import Tensor

from lckv.attention import backends
from lckv.attention.backends import Choice
from lckv.attention.visibility import Documents
from lckv.cost import average_keys
from lckv.losses import products
from lckv.policies.base import KVPolicy
from lckv_megatron.dry_run.recorder import Recorder
from lckv_megatron.dry_run.replacements import Replacement
from megatron_ext.errors import ConfigError
from megatron_ext.model import attention, build


def gpu_kernels(recorder: Recorder, policy: KVPolicy) -> Iterator[Replacement]:
    """For a run that would use them on a GPU."""
    yield Replacement(backends, "why_no_flash_package", lambda: None)
    yield Replacement(Documents, "without_first_tokens", property(_without_first_tokens))
    yield Replacement(attention, "choose_backend", _choose(recorder, attention.choose_backend))
    yield Replacement(torch.nn.functional, "rms_norm", partial(_rms_norm, recorder))
    yield Replacement(mlp, "bias_swiglu_impl", partial(_swiglu, recorder))
    yield Replacement(products, "gives_float32", lambda device, dtype: dtype == torch.bfloat16)
    for kernel in policy.kernels_of_shapes(lambda moved: recorder.kernel(flops=0, moved_bytes=moved)):
        yield Replacement(*kernel)
    yield Replacement(build, "transformer_config", _with_fused_swiglu(build.transformer_config))


def _with_fused_swiglu(transformer_config: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return replace(transformer_config(*args, **kwargs), bias_activation_fusion=True)

    return make


def _choose(recorder: Recorder, original: Callable[..., Choice]) -> Callable[..., Choice]:
    pretended = backends.flash_choice("pretended", cast(Any, FlashAttention(recorder)))

    def choose(name: str, *, dtype: torch.dtype, head_dim: int, **on_cpu: Any) -> Choice:
        device = torch.device("cuda")
        if name == "reference" or name == "sdpa" or backends.why_not_flash(device, dtype, head_dim):
            return original(name, device=device, dtype=dtype, head_dim=head_dim)
        return pretended

    return choose


def _without_first_tokens(documents: Documents) -> tuple[Tensor, Tensor]:
    bounds = documents.bounds
    left = bounds[-1] - (len(bounds) - 1)
    return torch.empty(left, dtype=torch.int64), torch.empty(len(bounds), dtype=torch.int32)


class FlashAttention:
    """The functions of flash-attn that `lckv.attention.flash` calls, for documents of equal length."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.flash_attn_interface = self

    def flash_attn_func(
        self, query: Tensor, key: Tensor, value: Tensor, *, window_size: tuple[int, int], **options: Any
    ) -> Tensor:
        """[b, s, heads, d] to the same."""
        return _Flash.apply(query, key, value, window_size[0], self)

    def flash_attn_varlen_func(
        self, query: Tensor, key: Tensor, value: Tensor, *, max_seqlen_q: int, **options: Any
    ) -> Tensor:
        """[tokens, heads, d] to the same: as rows [documents, tokens of one, heads, d].

        Raises ConfigError where documents are not equally long: the lengths are numbers, which a dry run does
        not have.
        """
        tokens = len(query)
        documents = len(options["cu_seqlens_q"]) - 1
        if documents * max_seqlen_q != tokens:
            raise ConfigError(
                f"{documents} documents of at most {max_seqlen_q} tokens have {tokens} tokens; a dry run "
                "knows documents of equal length only."
            )
        rows = (tensor.unflatten(0, (documents, max_seqlen_q)) for tensor in (query, key, value))
        return self.flash_attn_func(*rows, **options).flatten(0, 1)

    def _flash_attn_forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
        attended = self.forward(q, k, v, options["window_size_left"], causal=options["causal"])
        return (*attended, None, q.new_empty(2))

    def _flash_attn_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
        self.backward(q, k, options["window_size_left"], causal=options["causal"])

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, left: int, *, causal: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Output, and lse float32 [b, h, s]."""
        rows, tokens, heads, _ = query.shape
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty((rows, heads, tokens), dtype=torch.float32)
        self._work(query, key, left, causal, products=2, passes=2)
        return output, lse

    def backward(self, query: Tensor, key: Tensor, left: int, *, causal: bool = True) -> None:
        """The working memory of the kernel: a sum in float32, and gradients of keys for every query head."""
        rows, tokens, heads, channels = query.shape
        sums = query.new_empty(query.shape, dtype=torch.float32)
        rowwise = query.new_empty((rows, heads, tokens), dtype=torch.float32)
        expanded = heads != key.shape[2]
        shape = (2 * expanded, rows, key.shape[1], heads, channels)
        per_head = query.new_empty(shape)
        self._work(query, key, left, causal, products=5, passes=5)
        del sums, rowwise, per_head

    def _work(
        self, query: Tensor, key: Tensor, left: int, causal: bool, *, products: int, passes: int
    ) -> None:
        rows, tokens, heads, channels = query.shape
        seen: float = key.shape[1]
        if causal:
            seen = average_keys(tokens, exclude_self=False, window=None if left < 0 else left + 1)
        pairs = rows * heads * tokens * seen
        moved = passes * query.element_size() * (query.numel() + key.numel())
        self._recorder.kernel(flops=2 * products * pairs * channels, moved_bytes=moved)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, left: int, kernel: FlashAttention
    ) -> Tensor:
        output, lse = kernel.forward(query, key, value, left)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.left, ctx.kernel = left, kernel
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        gradients = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
        ]
        ctx.kernel.backward(query, key, ctx.left)
        return (*gradients, None, None)


def _rms_norm(
    recorder: Recorder, states: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _Norm.apply(states, weight, recorder)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, recorder: Recorder) -> Tensor:
        scale = states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(states, weight, scale)
        ctx.recorder = recorder
        recorder.kernel(flops=0, moved_bytes=2 * states.numel() * states.element_size())
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, _ = ctx.saved_tensors
        ctx.recorder.kernel(flops=0, moved_bytes=3 * states.numel() * states.element_size())
        return torch.empty_like(states), torch.empty_like(weight), None


def _swiglu(recorder: Recorder, states: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _SwiGLU.apply(states if bias is None else states + bias, recorder)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(states)
        ctx.recorder = recorder
        recorder.kernel(flops=0, moved_bytes=1.5 * states.numel() * states.element_size())
        return states.new_empty((*states.shape[:-1], states.shape[-1] // 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        ctx.recorder.kernel(flops=0, moved_bytes=2.5 * states.numel() * states.element_size())
        return torch.empty_like(states), None

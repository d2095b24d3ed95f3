"""What the kernels of a GPU keep and move, in place of those of the CPU.

The CPU's kernels keep more than a GPU's: the norm its input in float32, grouped attention under a window its
keys and values repeated. Here are, as shapes:
- attention as flash-attn does it, windows inside of the kernel, grouped heads as they are;
- RMSNorm as one kernel, which keeps its input and one number per token;
- SwiGLU as one kernel, which keeps its input, and RoPE as one, which keeps nothing;
- products of bfloat16 that leave their kernel in float32;
- what the KV policy runs as one kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lckv.attention import backends
from lckv.attention.backends import Choice
from lckv.cost import average_keys
from lckv.losses import products
from lckv.policies.base import KVPolicy
from lckv_megatron.dry_run.recorder import Recorder
from lckv_megatron.dry_run.replacements import Replacement
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model import core_attention, operators, transformer_config
from megatron_ext.model.operators import Operators


def gpu_kernels(recorder: Recorder, *policies: KVPolicy) -> Iterator[Replacement]:
    """For a run that would use them on a GPU, with models of these policies, each of another kind."""
    yield Replacement(backends, "why_no_flash_package", lambda: None)
    yield Replacement(core_attention, "choose_backend", _choose(recorder, core_attention.choose_backend))
    yield Replacement(torch.nn.functional, "rms_norm", partial(_rms_norm, recorder))
    yield Replacement(products, "gives_float32", lambda device, dtype: dtype == torch.bfloat16)
    for policy in policies:
        for kernel in policy.kernels_of_shapes(lambda moved: recorder.kernel(flops=0, moved_bytes=moved)):
            yield Replacement(*kernel)
    yield Replacement(transformer_config, "choose_operators", partial(_operators, recorder))


def _operators(recorder: Recorder, model: ModelConfig, parallel: ParallelConfig) -> Operators:
    """RMSNorm and SwiGLU as one kernel each, and where a GPU's RoPE is one, that. The norm of PyTorch is
    replaced itself."""
    plain = operators.choose("torch", device=torch.device("cpu"), widest=0)
    swiglu = replace(plain.swiglu, function=partial(_swiglu, recorder))
    if model.operator_backend == "torch":
        return replace(plain, swiglu=swiglu)
    return replace(plain, swiglu=swiglu, rope=replace(plain.rope, function=partial(_turned, recorder)))


def _choose(recorder: Recorder, original: Callable[..., Choice]) -> Callable[..., Choice]:
    pretended = backends.flash_choice("pretended", cast(Any, FlashAttention(recorder)))

    def choose(name: str, *, dtype: torch.dtype, head_dim: int, **on_cpu: Any) -> Choice:
        device = torch.device("cuda")
        if name == "reference" or name == "sdpa" or backends.why_not_flash(device, dtype, head_dim):
            return original(name, device=device, dtype=dtype, head_dim=head_dim)
        return pretended

    return choose


class FlashAttention:
    """The functions of flash-attn that `lckv.attention.flash` calls, for documents of equal length."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.flash_attn_interface = self

    def flash_attn_func(
        self, query: Tensor, key: Tensor, value: Tensor, *, window_size: tuple[int, int], **options: Any
    ) -> Tensor:
        """[b, s, heads, d] to the same."""
        return _Flash.apply(query, key, value, window_size[0], self, None)

    def flash_attn_varlen_func(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        window_size: tuple[int, int],
        **options: Any,
    ) -> Tensor:
        """[tokens, heads, d] to the same. Raises ConfigError where documents are not equally long: the
        lengths are numbers, which a dry run does not have."""
        sequences = equal_sequences(len(query), len(cu_seqlens_q) - 1, max_seqlen_q)
        return _Flash.apply(query, key, value, window_size[0], self, sequences)

    def _flash_attn_forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
        attended = self.forward(q, k, options["window_size_left"], causal=options["causal"])
        return (*attended, None, q.new_empty(2))

    def _flash_attn_backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
        self.backward(q, k, options["window_size_left"], causal=options["causal"])

    def _flash_attn_varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **options: Any
    ) -> tuple[Any, ...]:
        sequences = equal_sequences(len(q), len(bounds[0]) - 1, bounds[2])
        attended = self.forward(q, k, options["window_size_left"], sequences=sequences)
        return (*attended, None, q.new_empty(2))

    def _flash_attn_varlen_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> None:
        sequences = equal_sequences(len(q), len(options["cu_seqlens_q"]) - 1, options["max_seqlen_q"])
        self.backward(q, k, options["window_size_left"], sequences=sequences)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        left: int,
        *,
        causal: bool = True,
        sequences: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output, and lse float32 [b, h, s], or of `sequences` (their number and length) [h, tokens]."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty((*query.shape[:-3], query.shape[-2], query.shape[-3]), dtype=torch.float32)
        self._work(query, key, left, causal, sequences, products=2, passes=2)
        return output, lse

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        left: int,
        *,
        causal: bool = True,
        sequences: tuple[int, int] | None = None,
    ) -> None:
        """The working memory of the kernel: a sum in float32, and gradients of keys for every query head."""
        heads, channels = query.shape[-2:]
        sums = query.new_empty(query.shape, dtype=torch.float32)
        rowwise = query.new_empty(query.shape[:-1], dtype=torch.float32)
        expanded = heads != key.shape[-2]
        per_head = query.new_empty((2 * expanded, *key.shape[:-2], heads, channels))
        self._work(query, key, left, causal, sequences, products=5, passes=5)
        del sums, rowwise, per_head

    def _work(
        self,
        query: Tensor,
        key: Tensor,
        left: int,
        causal: bool,
        sequences: tuple[int, int] | None,
        *,
        products: int,
        passes: int,
    ) -> None:
        rows, tokens = query.shape[:2] if sequences is None else sequences
        heads, channels = query.shape[-2:]
        seen: float = key.shape[1]
        if causal:
            seen = average_keys(tokens, exclude_self=False, window=None if left < 0 else left + 1)
        pairs = rows * heads * tokens * seen
        moved = passes * query.element_size() * (query.numel() + key.numel())
        self._recorder.kernel(flops=2 * products * pairs * channels, moved_bytes=moved)


def equal_sequences(tokens: int, sequences: int, longest: int) -> tuple[int, int]:
    """The number and the length of documents that are equally long, from what a kernel gets of them: `tokens`
    in `sequences`, of which some are closed where queries do not see their newest keys
    (`lckv.attention.sequences`). Raises ConfigError where they cannot be equally long."""
    if sequences * longest == tokens:
        return sequences, longest
    for behind in (1, 2):
        # between two documents of a row lies a closed sequence of so many tokens
        documents = -(-tokens // (longest + behind))
        rows = 2 * documents - sequences
        if documents * (longest + behind) - rows * behind == tokens:
            return documents, longest
    raise ConfigError(
        f"{sequences} documents of at most {longest} tokens have {tokens} tokens; a dry run knows documents "
        "of equal length only."
    )


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        left: int,
        kernel: FlashAttention,
        sequences: tuple[int, int] | None,
    ) -> Tensor:
        output, lse = kernel.forward(query, key, left, sequences=sequences)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.left, ctx.kernel, ctx.sequences = left, kernel, sequences
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        gradients = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
        ]
        ctx.kernel.backward(query, key, ctx.left, sequences=ctx.sequences)
        return (*gradients, None, None, None)


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


def _turned(
    recorder: Recorder,
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    last: Tensor | float | None,
    *,
    back: bool = False,
) -> Tensor:
    recorder.kernel(flops=0, moved_bytes=2 * heads.numel() * heads.element_size())
    return heads.new_empty(heads.shape)


def _swiglu(recorder: Recorder, states: Tensor) -> Tensor:
    return _SwiGLU.apply(states, recorder)


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

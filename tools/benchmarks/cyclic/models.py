"""Trains and measures the model of a cell."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from lckv.config import CompressionConfig
from lckv.cost import training_cost
from lckv.generation.prefill import Settling
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import Iteration, LCKVLlamaForCausalLM
from tools.benchmarks.cyclic.grid import LAYERS, Cell, Sizes

_MOST_PASSES, _TOLERANCE = 32, 1e-3
_PLAIN_EVERY = 25
"""Steps between two of the plain model, whose time is the unit."""


def trained(cell: Cell, sizes: Sizes, training: Tensor, held_out: Tensor) -> dict[str, object]:
    """Train the model of a cell; what it cost and what it can."""
    plain, model = (new_model(it, sizes) for it in (Cell("plain", 0, 1, seed=cell.seed), cell))
    if cell.fp8:
        round_passes_without_gradient(model)
    steps = round(cell.share * sizes.steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=sizes.learning_rate, total_steps=steps, pct_start=0.1
    )
    batches = batches_of(training, sizes, cell.seed)
    seconds: list[float] = []
    plain_seconds: list[float] = []
    flops, of_plain = 0.0, training_cost(sizes.shape(), CompressionConfig()).model_flops
    for number in range(steps):
        batch = next(batches)
        plan = cell.plan(number, steps)
        model.model.steps = plan.plan(LAYERS)
        flops += training_cost(sizes.shape(), plan).ratio / steps
        start = time.process_time()
        _backward(model, batch)
        seconds.append(time.process_time() - start)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number % _PLAIN_EVERY == 0:
            start = time.process_time()
            _backward(plain, batch)
            plain_seconds.append(time.process_time() - start)
            plain.zero_grad()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * sizes.rows * sizes.length,
        "training_flops": f"{flops * steps * sizes.rows * sizes.length * of_plain:.4g}",
        "flops_of_plain_step": f"{flops:.4f}",
        "cpu_seconds_of_plain_step": round(statistics.mean(seconds) / statistics.mean(plain_seconds), 3),
        **measure(model, cell, held_out, sizes.length),
    }


def new_model(cell: Cell, sizes: Sizes) -> LCKVLlamaForCausalLM:
    """With the initial weights of the cell's seed."""
    torch.manual_seed(cell.seed)
    shape = sizes.shape()
    config = LCKVLlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        compression=asdict(cell.compression),
    )
    model = LCKVLlamaForCausalLM(config).train()
    if not cell.first_guess:
        return model
    same = new_model(replace(cell, first_guess=False), sizes)
    model.load_state_dict(same.state_dict(), strict=False)  # the first guess begins at zero
    return model


def batches_of(tokens: Tensor, sizes: Sizes, seed: int) -> Iterator[Tensor]:
    """int64 [rows, length], the same for all models of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in count():
        starts = torch.randint(len(tokens) - sizes.length, (sizes.rows,), generator=generator).tolist()
        yield torch.stack([tokens[start : start + sizes.length] for start in starts])


def round_passes_without_gradient(model: LCKVLlamaForCausalLM) -> None:
    """From now on linear maps of the layers compute in such passes, while the model is in training mode, with
    weights and inputs as FP8 (e4m3) represents them, each tensor with a scale of its own."""

    def rounded(module: nn.Linear, states: Tensor) -> Tensor:
        weight = module.weight
        if module.training and not torch.is_grad_enabled():
            states, weight = _to_fp8(states), _to_fp8(weight)
        return nn.functional.linear(states, weight, module.bias)

    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(rounded, module)  # type: ignore[method-assign]


def _to_fp8(tensor: Tensor) -> Tensor:
    kind = torch.float8_e4m3fn
    scale = tensor.abs().amax().clamp(min=1e-12) / torch.finfo(kind).max
    return (tensor / scale).to(kind).to(tensor.dtype) * scale


def _backward(model: LCKVLlamaForCausalLM, batch: Tensor) -> None:
    model(batch, labels=batch).loss.backward()


@torch.inference_mode()
def measure(model: LCKVLlamaForCausalLM, cell: Cell, held_out: Tensor, length: int) -> dict[str, object]:
    """Losses of the trained model."""
    model.eval()
    rows, longer = held_out.view(-1, length), held_out.view(-1, 2 * length)
    exact, passes = exact_loss(model, rows)
    twice, _ = exact_loss(model, longer)
    own = loss_after(model, rows, cell.m + cell.b, cell.first_guess)
    losses = {"loss_exact": exact, "loss_own_passes": own}
    losses |= {f"loss_zeros_{number}": loss_after(model, rows, number) for number in (1, 2, 3)}
    if cell.first_guess:
        losses |= {f"loss_guess_{number}": loss_after(model, rows, number, True) for number in (1, 2, 3)}
    else:
        losses |= {f"loss_guess_{number}": math.nan for number in (1, 2, 3)}
    losses |= {"loss_exact_twice_the_length": twice}
    return {name: f"{value:.4f}" for name, value in losses.items()} | {"passes_until_exact": passes}


def exact_loss(model: LCKVLlamaForCausalLM, rows: Tensor) -> tuple[float, float]:
    """The loss with settled keys and values, and how many passes that took."""
    settling = Settling(_TOLERANCE, _MOST_PASSES, len(rows), None, key_bias=None, device=rows.device)
    loss = _loss(model, rows, Iteration(_MOST_PASSES, settling, first_guess=False))
    return loss, float(settling.passes.double().mean())


def loss_after(model: LCKVLlamaForCausalLM, rows: Tensor, passes: int, first_guess: bool = False) -> float:
    """The loss after so many passes, from the learned first guess or from zeros."""
    return _loss(model, rows, Iteration(passes, first_guess=first_guess))


def _loss(model: LCKVLlamaForCausalLM, rows: Tensor, iteration: Iteration) -> float:
    states = model.model.run(model.model.embed_tokens(rows), iteration=iteration).last_hidden_state
    assert states is not None
    logits = model.lm_head(states)
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))

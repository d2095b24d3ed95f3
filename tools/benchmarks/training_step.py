"""Times one training step (forward and backward) of several sharing maps against Megatron's own GPTModel, in
one run.

    python tools/benchmarks/training_step.py --output tools/benchmarks/results/training_step.csv

Each map's measured ratio to the plain map stands beside the ratio
that its operation count predicts (lckv/cost.py).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from lckv.config import CompressionConfig
from lckv.cost import training_cost
from lckv_megatron.measuring.timing import CLOCKS, median_seconds, setting, write_csv
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.cost import model_shape
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.policy_statistics import PolicyInputs
from megatron_ext.model.transformer_config import transformer_config
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from tools.benchmarks.policies import merging_policies, policy_of

MAPS = {
    "plain": CompressionConfig(),
    "cla": CompressionConfig(layer_types="0_0_2_2_4_4_6_6"),
    "yoco": CompressionConfig(layer_types="0s_1s_2s_3s_4_4_4_4", sliding_window=128),
    "lckv": CompressionConfig(layer_types="0_6_6_6_6_6_6_7"),
    "lckv m3 b1": CompressionConfig(layer_types="0_6_6_6_6_6_6_7", forward_passes=3, backward_passes=1),
    "lckv m1 b1 guess": CompressionConfig(
        layer_types="0_6_6_6_6_6_6_7", forward_passes=1, backward_passes=1, first_guess=True
    ),
    "sandwich-middle": CompressionConfig(layer_types="0_3_3_3_3_3_3_7"),
}
WITH_POLICIES = ("plain", "cla", "sandwich-middle")
"""Maps that are also timed with each policy that is asked for."""


def kinds_of(policies: Sequence[str]) -> dict[str, CompressionConfig]:
    """Every map, and some with each of `policies`, NAME or NAME:FIELD=VALUE:..., by the names of both."""
    both = {
        f"{name} x {text}": replace(MAPS[name], policy=policy_of(text))
        for text in policies
        for name in WITH_POLICIES
    }
    return {**MAPS, **both}


def policies_at_work(seq_length: int) -> list[str]:
    """Those that merge or drop something of a text of `seq_length` tokens."""
    biases = {text: policy_of(text).traits.key_bias for text in merging_policies().values()}
    return [text for text, bias in biases.items() if bias is not None and bias.age < seq_length]


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    hidden_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    precision: str
    num_layers: int = 8

    def with_layers(self, num_layers: int) -> "Sizes":
        """The same with so many layers."""
        return replace(self, num_layers=num_layers)

    @property
    def model(self) -> ModelConfig:
        """Layers of these sizes."""
        return ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_query_groups=self.kv_heads,
        )

    @property
    def train(self) -> TrainConfig:
        """The numerics."""
        return TrainConfig(precision=self.precision)  # type: ignore[arg-type]


def megatron_step(sizes: Sizes, tokens: torch.Tensor) -> Callable[[], None]:
    """A step of Megatron's GPTModel with its local spec, whose norm is exchanged
    for one that the configuration allows."""
    config = transformer_config(
        sizes.model, CompressionConfig(), ParallelConfig(), sizes.train, vocab_size=sizes.vocab_size
    )
    on_gpu = device_of_rank().type == "cuda"
    own_activation: dict[str, Any] = {"use_te_activation_func": False, "bias_activation_fusion": on_gpu}
    config = replace(config, **own_activation)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    model = GPTModel(
        config,
        spec,
        vocab_size=sizes.vocab_size,
        max_sequence_length=sizes.seq_length,
        position_embedding_type="rope",
    ).to(device_of_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)

    def step() -> None:
        model(tokens, positions, mask, labels=tokens).mean().backward()

    return step


def shared_step(sizes: Sizes, compression: CompressionConfig, tokens: torch.Tensor) -> Callable[[], None]:
    """A step of this project's model."""
    model = build_stage(sizes.model, compression, ParallelConfig(), sizes.train, vocab_size=sizes.vocab_size)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    policy = PolicyInputs(row_seeds=tuple(range(len(tokens))), progress=0.5)

    def step() -> None:
        losses, report = model(tokens, positions, tokens, policy=policy)
        auxiliary = 0.0 if report.auxiliary_loss is None else report.auxiliary_loss.mean()
        (losses.total / tokens.numel() + auxiliary).backward()

    return step


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument(
        "--policies",
        nargs="*",
        metavar="NAME[:FIELD=VALUE...]",
        help="KV policies to time too (default: all that merge or drop something of texts so short)",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: on a busy machine, with one thread."
    )
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    sizes = Sizes(
        options.hidden_size,
        options.heads,
        options.kv_heads,
        options.vocab_size,
        options.seq_length,
        options.micro_batch_size,
        options.precision,
    )
    initialize(ParallelConfig(), seed=1)
    tokens = torch.randint(
        sizes.vocab_size, (sizes.micro_batch_size, sizes.seq_length), device=device_of_rank()
    )
    steps = {"megatron GPTModel": megatron_step(sizes, tokens)}
    policies = options.policies
    kinds = kinds_of(policies_at_work(sizes.seq_length) if policies is None else policies)
    steps |= {name: shared_step(sizes, compression, tokens) for name, compression in kinds.items()}
    measured = median_seconds(steps, repeats=options.repeats, clock=options.clock)
    shape = model_shape(sizes.model, vocab_size=sizes.vocab_size, seq_length=sizes.seq_length)
    rows = []
    for name, seconds in measured.items():
        predicted = training_cost(shape, kinds.get(name, CompressionConfig())).ratio
        ratio = seconds / measured["plain"]
        rows.append(
            {
                "model": name,
                "layer_types": kinds[name].layer_types or "" if name in kinds else "",
                "milliseconds": round(1000 * seconds, 1),
                "ratio_to_plain": round(ratio, 3),
                "predicted_ratio": round(predicted, 3),
                "measured_over_predicted": round(ratio / predicted, 3),
                "tokens": f"{sizes.micro_batch_size}x{sizes.seq_length}",
                "precision": sizes.precision,
                **setting(device_of_rank().type),
            }
        )
        print(
            f"{name:<18} {1000 * seconds:9.1f} ms   {ratio:5.2f}x plain, predicted {predicted:5.2f}x",
            flush=True,
        )
    if options.output:
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()

"""Measures how the memory of one training step (forward and backward) grows with the number of layers, for
several sharing maps.

    python -m tools.benchmarks.activation_memory --output tools/benchmarks/results/activation_memory.csv

saved: bytes of activations that forward keeps for backward, each storage counted once (exact, on any device).
predicted: what megatron_ext/model/memory.py expects of them with full recompute. peak: the most bytes alive
at a time during the step, beyond weights and gradients. growth: per layer since the row above, in layer
inputs (tokens x hidden size numbers); that of the peak contains the random states that Megatron's recompute
keeps, 5 or 10 kB of host memory per layer.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from lckv.config import CompressionConfig
from lckv_megatron.layouts import LAYOUTS, YOCO_WINDOW
from lckv_megatron.measuring.timing import peak_bytes, setting, write_csv
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.memory import kept_bytes, kept_for_backward
from megatron_ext.model.offloaded import OffloadedLayers
from megatron_ext.model.trainable import choose_trainable
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from megatron_ext.precision import precision

RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Step:
    """Forward and backward of one micro-batch, on a model whose gradients exist already."""

    forward: Callable[[], torch.Tensor]
    parameters: Sequence[torch.nn.Parameter]

    offloaded: OffloadedLayers | None = None
    """What runs its layers where activations go to the host."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        compression: CompressionConfig,
        train: TrainConfig,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
    ) -> "Step":
        """Of a new model without pipeline stages. Needs process groups."""
        vocab_size = model.vocab_size or 1
        stage = build_stage(model, compression, parallel, train, vocab_size=vocab_size)
        choose_trainable(stage, train.trainable)
        tokens = torch.randint(
            vocab_size, (train.micro_batch_size, train.seq_length), device=device_of_rank()
        )
        positions = torch.arange(train.seq_length, device=tokens.device).expand_as(tokens)

        def forward() -> torch.Tensor:
            return stage(tokens, positions, tokens)[0].total / tokens.numel()

        step = cls(forward, list(stage.parameters()), stage.decoder.offloaded)
        step.run()
        return step

    def run(self) -> None:
        """Forward and backward."""
        self.forward().backward()

    def saved_bytes(self) -> int:
        """Kept by forward for backward, parameters left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        loss.backward()
        return sum(saved.values())


def measure(
    name: str,
    layer_types: Callable[[int], str],
    depths: Sequence[int],
    model: ModelConfig,
    train: TrainConfig,
) -> Iterator[dict[str, object]]:
    """One row for each number of layers."""
    layer_input = precision(train.precision).bytes
    layer_input *= train.micro_batch_size * train.seq_length * model.hidden_size
    last: Mapping[str, int] = {}
    for layers in depths:
        sized = ModelConfig(**{**vars(model), "num_layers": layers})
        text = layer_types(layers)
        window = min(YOCO_WINDOW, train.seq_length // 4) if "s" in text else None
        compression = CompressionConfig(layer_types=text, sliding_window=window)
        step = Step.of(sized, compression, train)
        measured = {"layers": layers, "saved": step.saved_bytes(), "peak": peak_bytes(step.run)}
        kept = kept_for_backward(compression, layers, range(layers))
        growth = {
            f"{what}_growth": round(
                (measured[what] - last[what]) / (layers - last["layers"]) / layer_input, 3
            )
            if last
            else ""
            for what in ("saved", "peak")
        }
        yield {
            "map": name,
            "recompute": train.recompute_granularity,
            "layers": layers,
            "saved_bytes": measured["saved"],
            "predicted_bytes": kept_bytes(kept, sized, compression, ParallelConfig(), train)
            if train.recompute_granularity == "full"
            else "",
            "peak_bytes": measured["peak"],
            **growth,
        }
        last = measured


def add_sizes(parser: argparse.ArgumentParser, *, hidden_size: int, seq_length: int) -> None:
    """Options of the model and of its rows, with these defaults, and where to write."""
    parser.add_argument("--hidden-size", type=int, default=hidden_size)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=seq_length)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument("--output", type=Path, help="CSV file")


def model_of(options: argparse.Namespace) -> ModelConfig:
    """What `add_sizes` asks for."""
    return ModelConfig(
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        num_query_groups=options.kv_heads,
        vocab_size=options.vocab_size,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--micro-batch-size", type=int, default=2)
    add_sizes(parser, hidden_size=128, seq_length=256)
    options = parser.parse_args(argv)
    model = model_of(options)
    sizes = {
        "tokens": f"{options.micro_batch_size}x{options.seq_length}",
        "hidden_size": options.hidden_size,
        "precision": options.precision,
    }
    initialize(ParallelConfig(), seed=1)
    rows = []
    for recompute in RECOMPUTE:
        train = TrainConfig(
            micro_batch_size=options.micro_batch_size,
            seq_length=options.seq_length,
            precision=options.precision,
            recompute_granularity=recompute,  # type: ignore[arg-type]
        )
        for layout in LAYOUTS:
            for row in measure(layout.name, layout.layer_types, options.layers, model, train):
                rows.append(row | sizes | setting(device_of_rank().type))
                print("   ".join(f"{value:>15}" for value in row.values()), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()

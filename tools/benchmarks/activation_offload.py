"""What layers hold between forward and backward, on the device and on the host, and what that costs in time,
for activations that stay, are recomputed, or go to the host (docs/long_context.md).

    python -m tools.benchmarks.activation_offload --output tools/benchmarks/results/activation_offload.csv

device, host: bytes per token and layer, by allocation: what a forward leaves alive with twice the layers,
minus what it does with so many, so that embedding and loss do not count. buffers: of the device, for all
layers together. time: of a training step, as a ratio to the one without recomputation in the same run, in
turns. On a CPU a copy to the host is a copy within its memory, and nothing runs beside it: the ratio is then
no measure of what copies cost a GPU, but of what is computed again and of the copies together.
"""

import argparse
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lckv.config import CompressionConfig
from lckv_megatron.layouts import LAYOUTS
from lckv_megatron.measuring.timing import held_bytes, median_seconds, setting, write_csv
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from tools.benchmarks.activation_memory import Step, add_sizes, model_of

MAPS = ("plain", "LCKV (w=2)")


@dataclass(frozen=True)
class Way:
    """What becomes of activations."""

    name: str
    changes: Mapping[str, Any]
    """Of `TrainConfig`."""


def ways(shares: Sequence[float]) -> Iterator[Way]:
    """All that are compared; the first is the measure."""
    yield Way("none", {})
    yield Way("full recompute", {"recompute_granularity": "full"})
    for share in shares:
        changes = {"activation_offload": "token_wise", "offload_fraction": share}
        yield Way(f"token-wise {share:g}", changes)


def measure(
    name: str, model: ModelConfig, train: TrainConfig, shares: Sequence[float], repeats: int
) -> Iterator[dict[str, object]]:
    """One row for each way, of a map of LAYOUTS."""
    (layout,) = (layout for layout in LAYOUTS if layout.name == name)
    tokens, layers = train.micro_batch_size * train.seq_length, model.num_layers
    held: dict[str, list[tuple[int, int]]] = {}
    steps: dict[str, Step] = {}
    for way in ways(shares):
        for number in (layers, 2 * layers):
            compression = CompressionConfig(layer_types=layout.layer_types(number))
            sized = replace(model, num_layers=number)
            step = Step.of(sized, compression, replace(train, **way.changes))
            if step.offloaded is not None:
                gc.collect()  # the graph of a step before
                step.offloaded.begin()  # which has left its buffers
            held.setdefault(way.name, []).append((held_bytes(step.forward), _host_bytes(step)))
            if number == layers:
                steps[way.name] = step
    seconds = median_seconds(
        {name: step.run for name, step in steps.items()}, repeats=repeats, clock=_clock()
    )
    for activations, (few, many) in held.items():
        yield {
            "map": name,
            "activations": activations,
            "device_bytes": round((many[0] - few[0]) / layers / tokens),
            "host_bytes": round((many[1] - few[1]) / layers / tokens),
            "buffers_bytes": _buffers_bytes(steps[activations]),
            "time_ratio": round(seconds[activations] / seconds["none"], 2),
        }


def _clock() -> str:
    return "wall" if torch.cuda.is_available() else "cpu"


def _host_bytes(step: Step) -> int:
    """On the host after a forward."""
    if step.offloaded is None:
        return 0
    loss = step.forward()
    used = step.offloaded.storage.pool.used
    del loss
    return used


def _buffers_bytes(step: Step) -> int:
    return 0 if step.offloaded is None else step.offloaded.storage.buffers.device_bytes


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--repeats", type=int, default=5)
    add_sizes(parser, hidden_size=256, seq_length=1024)
    options = parser.parse_args(argv)
    model = replace(model_of(options), num_layers=options.layers)
    train = TrainConfig(micro_batch_size=1, seq_length=options.seq_length, precision=options.precision)
    initialize(ParallelConfig(), seed=1)
    sizes = {
        "layers": options.layers,
        "tokens": options.seq_length,
        "hidden_size": options.hidden_size,
        "precision": options.precision,
    }
    rows = []
    for name in MAPS:
        for row in measure(name, model, train, options.shares, options.repeats):
            rows.append(row | sizes | setting(device_of_rank().type))
            print("   ".join(f"{value:>15}" for value in row.values()), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()

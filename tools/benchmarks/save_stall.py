"""For how long a save stops the training, at once and in the background, in one run on one process.

    python tools/benchmarks/save_stall.py --output tools/benchmarks/results/save_stall.csv

In each round every way saves the same state once, and the run trains on until that is a checkpoint. The
stall of a save in the background is the time until it has begun, and that of the boundaries where the ranks
ask whether it is written and make a checkpoint of it.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from lckv.config import CompressionConfig
from lckv_megatron.measuring.timing import setting, write_csv
from megatron_ext.checkpointing.save import saves
from megatron_ext.checkpointing.writing import RunState
from megatron_ext.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.model.policy_statistics import PolicyInputs
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from megatron_ext.training.optimizer import build_optimizer

WAYS: dict[str, dict[str, Any]] = {
    f"{way}, {sharding}": {"in_background": way == "in background", "sharding": sharding}
    for sharding in ("fully_reshardable", "dp_reshardable")
    for way in ("at once", "in background")
}


@dataclass(frozen=True)
class Measured:
    """One save."""

    stalled: float
    """Seconds in which the run stood still."""
    seconds: float
    """Until it was a checkpoint."""
    megabytes: float


class Trained:
    """A model that trains."""

    def __init__(self, hidden_size: int, precision: str) -> None:
        train = TrainConfig(precision=precision, micro_batch_size=1, seq_length=64)  # type: ignore[arg-type]
        model = ModelConfig(num_layers=8, hidden_size=hidden_size, num_attention_heads=8)
        parallel = ParallelConfig()
        stage = build_stage(
            model, CompressionConfig(layer_types="0_6_6_6_6_6_6_7"), parallel, train, vocab_size=8192
        )
        self.model: MegatronModule = wrap(stage, parallel, train)
        self.optimizer, self.scheduler = build_optimizer(OptimizerConfig(), parallel, train, self.model)
        self._tokens = torch.randint(8192, (1, train.seq_length), device=device_of_rank())

    def step(self) -> None:
        """Forward, backward and update."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        positions = torch.arange(self._tokens.shape[1], device=self._tokens.device)[None]
        policy = PolicyInputs(row_seeds=(0,), progress=0.5)
        mean = torch.full(self._tokens.shape, 1 / self._tokens.numel(), device=self._tokens.device)
        losses, _ = self.model(self._tokens, positions, self._tokens, policy=policy, loss_mask=mean)
        losses.total.backward()
        self.model.finish_grad_sync()
        self.optimizer.step()

    def state(self) -> RunState:
        """What is saved."""
        return RunState([self.model], self.optimizer, self.scheduler, progress={}, config={})


def measure(trained: Trained, options: dict[str, Any]) -> Measured:
    """One save, during which the run trains on."""
    with tempfile.TemporaryDirectory() as folder, saves(Path(folder), **options) as made:
        started = time.perf_counter()
        made.save(1, trained.state())
        while made.in_flight:
            trained.step()
            made.settle()
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return Measured(made.stalled_seconds(), seconds, size / 1e6)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    initialize(ParallelConfig(), seed=1)
    trained = Trained(options.hidden_size, options.precision)
    trained.step()
    measured: dict[str, list[Measured]] = {name: [] for name in WAYS}
    for number in range(1 + options.repeats):
        for name, way in WAYS.items():
            result = measure(trained, way)
            if number > 0:  # the first round warms up
                measured[name].append(result)
    rows = []
    for name, results in measured.items():
        at_once = measured[name.replace("in background", "at once")]
        median = partial(_median, results)
        ratio = median("stalled") / _median(at_once, "stalled")
        row = {
            "way": name.partition(", ")[0],
            "optimizer_sharding": name.partition(", ")[2],
            "stall_seconds": round(median("stalled"), 4),
            "ratio_to_at_once": round(ratio, 4),
            "save_seconds": round(median("seconds"), 4),
            "megabytes": round(median("megabytes"), 1),
            "precision": options.precision,
            **setting(device_of_rank().type),
        }
        rows.append(row)
        print(
            f"{name:<34} stands still {row['stall_seconds']:8.3f} s, {100 * ratio:5.1f} % of at once; "
            f"a checkpoint after {row['save_seconds']:.3f} s, {row['megabytes']} MB",
            flush=True,
        )
    if options.output:
        write_csv(options.output, rows)
    destroy()


def _median(results: list[Measured], name: str) -> float:
    return statistics.median(getattr(result, name) for result in results)


if __name__ == "__main__":
    main()

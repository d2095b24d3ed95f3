"""How long a step takes on two pipeline stages, compared with one process that does the same work, and what
the list of the step's work predicts.

    python -m tools.benchmarks.pipeline --output tools/benchmarks/results/pipeline.csv
    python -m tools.benchmarks.pipeline --picture docs/images/pipeline_bubbles.png

ratio: seconds on two stages, to seconds on one process. predicted: the same by the list, whose work is
counted in operations, where sending takes no time: at best 0.5. --picture measures nothing: it draws the
share of time that stages wait, predicted for more stages and micro-batches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lckv.sharing.layer_types import LayerTypes
from lckv_megatron.measuring.timing import setting, write_csv
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.model.placement import place
from megatron_ext.schedule.ticks import Leg, Ticks, schedule, ticks_of

_MAPS = {"LCKV, w = 2": "0_6_6_6_6_6_6_7", "plain": "0_1_2_3_4_5_6_7"}
_STAGES, _MICRO_BATCHES = range(2, 9), (4, 8, 16, 32, 64)
_VOCABULARY = 1024


def settings(layer_types: str, stages: int, options: argparse.Namespace) -> list[str]:
    """Of a run with mock data."""
    values = {
        "model.num_layers": len(LayerTypes.parse(layer_types, layer_types.count("_") + 1)),
        "model.hidden_size": options.hidden_size, "model.num_attention_heads": 4,
        "model.vocab_size": _VOCABULARY, "compression.layer_types": layer_types, "data.mock": "true",
        "data.num_workers": 0, "train.precision": "fp32", "train.seq_length": options.seq_length,
        "train.micro_batch_size": 1, "train.global_batch_size": options.micro_batches,
        "train.train_iters": options.steps, "optimizer.lr_warmup_iters": 0, "logging.log_interval": 1,
        "logging.progress_bar": "false", "parallel.pipeline_model_parallel_size": stages,
    }  # fmt: skip
    if stages > 1:
        values["parallel.pipeline_model_parallel_layout"] = "auto"
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def seconds_of_step(arguments: list[str], processes: int) -> float:
    """Median, without the first step."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        program = [str(processes), "pretrain_lckv.py", *arguments, "--logging.metrics_file", str(metrics)]
        subprocess.run([*launch, *program], check=True, capture_output=True)
        reports = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return statistics.median(report["iteration_seconds"] for report in reports[1:])


def predicted(run: RunConfig, micro_batches: int) -> tuple[Ticks, float]:
    """The list of a step on its stages, and its length to that of one process."""
    placement = place(
        run.model, run.compression, run.parallel, vocab_size=_VOCABULARY, seq_length=run.train.seq_length
    )
    ticks = ticks_of(placement, placement.journey(run.compression), micro_batches, None)
    return ticks, 1 / (ticks.stages * (1 - ticks.bubble))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each map."""
    for name, layer_types in _MAPS.items():
        pair = [settings(layer_types, stages, options) for stages in (1, 2)]
        one, two = (seconds_of_step(arguments, stages) for stages, arguments in enumerate(pair, 1))
        ticks, ratio = predicted(parse_run_config(pair[1]), options.micro_batches)
        yield {
            "map": name,
            "stages": 2,
            "micro_batches": options.micro_batches,
            "seconds_one_process": round(one, 4),
            "seconds": round(two, 4),
            "ratio": round(two / one, 3),
            "predicted_ratio": round(ratio, 3),
            "predicted_bubble": round(ticks.bubble, 4),
            **setting("cpu"),
        }


def draw(path: Path) -> None:
    """Predicted bubbles of even stages with m = 7 and b = 2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for number, (title, in_flight) in enumerate((("stages in flight", 1), ("2 x stages in flight", 2)), 1):
        axes = figure.add_subplot(1, 2, number)
        table = [
            [100 * _even(stages, batches, in_flight * stages).bubble for batches in _MICRO_BATCHES]
            for stages in _STAGES
        ]
        axes.imshow(table, cmap="YlOrRd", vmin=0, vmax=50, aspect="auto")
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                axes.text(column, row, f"{value:.0f} %", ha="center", va="center")
        axes.set_xticks(range(len(_MICRO_BATCHES)), list(map(str, _MICRO_BATCHES)))
        axes.set_yticks(range(len(_STAGES)), list(map(str, _STAGES)))
        axes.set_xlabel("micro-batches per step")
        axes.set_ylabel("stages")
        axes.set_title(f"share of time that stages wait, {title}", fontsize=10)
    figure.savefig(path, dpi=110)


def _even(stages: int, micro_batches: int, in_flight: int) -> Ticks:
    prepare, train = (
        [Leg(stage, 1.0) for _ in range(passes) for stage in range(stages)] for passes in (7, 2)
    )
    return schedule([*prepare, Leg(0, 0.0)], train, micro_batches, in_flight)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--picture", type=Path, help="draw predictions into this PNG and measure nothing")
    options = parser.parse_args(argv)
    if options.picture is not None:
        draw(options.picture)
        return
    rows = []
    for row in measure(options):
        rows.append(row)
        print(row)
    if options.output is not None:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()

"""What the retrofit cost and what it saved: perplexity of every stage, tokens per slot, bytes of KV cache per
token."""

import sys
from pathlib import Path

from lckv.cost import kv_bytes_per_token
from megatron_ext.command_line import parse_run_config
from megatron_ext.model.cost import model_shape
from megatron_ext.training.metrics import read_metrics

STAGES = ("dense", "control", "zero_out", "retrofit", "finetune")
LEAST_RATIO = 1.9
MOST_PERPLEXITY = 1.1
"""Of the last stage, relative to the plain model after as many steps."""


def main(folder: str) -> int:
    """Print a line per stage; 1 where the last one does not merge as it should, or has become worse for
    it."""
    run = parse_run_config(["--config", str(Path(__file__).parent / "base.yaml")])
    shape = model_shape(run.model, vocab_size=0, seq_length=run.train.seq_length)
    whole = kv_bytes_per_token(shape, run.compression.map(run.model.num_layers), bytes_per_number=4)
    ratio, perplexity = 1.0, {}
    print(f"{'stage':<10} {'perplexity':>10} {'tokens per slot':>16} {'KV bytes per token':>19}")
    for stage in STAGES:
        reports = read_metrics(Path(folder) / stage / "metrics.jsonl")
        last = next(report for report in reversed(reports) if "validation_perplexity" in report)
        perplexity[stage] = last["validation_perplexity"]
        ratio = last.get("validation_compression_ratio", 1.0)
        print(f"{stage:<10} {perplexity[stage]:>10.2f} {ratio:>16.2f} {whole / ratio:>19.0f}")
    if ratio < LEAST_RATIO:
        print(
            f"the last stage merges {ratio:.2f} tokens per slot; at least {LEAST_RATIO} were asked for",
            file=sys.stderr,
        )
        return 1
    if perplexity["finetune"] > MOST_PERPLEXITY * perplexity["control"]:
        print(
            "the last stage is more than 10 % worse than the plain model after as many steps", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

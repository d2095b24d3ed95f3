"""Whether the demo learned: its last validation loss must be well below the unigram entropy of its corpus."""

import sys
from pathlib import Path

from megatron_ext.data.statistics import unigram_entropy
from megatron_ext.training.metrics import read_metrics

MARGIN_NATS = 1.0


def main(prefix: str, metrics: str) -> int:
    """Print both numbers; 1 where the loss is less than MARGIN_NATS below the entropy."""
    entropy = unigram_entropy(prefix)
    losses = [
        report["validation_loss"] for report in read_metrics(Path(metrics)) if "validation_loss" in report
    ]
    print(
        f"validation loss {losses[-1]:.3f} nats per token; a model that knows only word frequencies has "
        f"{entropy:.3f}"
    )
    if losses[-1] <= entropy - MARGIN_NATS:
        return 0
    print(f"the loss should be at least {MARGIN_NATS} below: the model has not learned", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

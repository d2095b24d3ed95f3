"""What a retrofit has come to: losses of its stages, perplexities, tokens per slot. Fails where distillation
does not help."""

import json
import sys
from pathlib import Path
from typing import Any

STAGES = ("map-distilled", "dms-zero-out", "dms-retrofit", "dms-finetune")
MEASURED = ("original", "map-before", "map-after", "dms-after")
_SHARE = 4
"""A mean over this part of a stage's steps stands for its beginning, and for its end."""


def main(folder: str) -> int:
    """Print a line for each stage and each model; 1 where a loss has not fallen that should have."""
    place = Path(folder)
    worse = []
    for name in STAGES:
        reports = _reports(place / f"{name}.jsonl")
        losses = [report["distillation_loss"] for report in reports if "distillation_loss" in report]
        if not losses:
            continue
        few = max(1, len(losses) // _SHARE)
        first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
        ratio = reports[-1].get("compression_ratio")
        slots = "" if ratio is None else f", {ratio:.2f} tokens per slot in training"
        print(f"{name:<16} distillation loss {first:.4f} -> {last:.4f} in {len(losses)} reports{slots}")
        if name == "map-distilled" and not last < first:
            worse.append(name)
    measured = {name: _measured(place / f"{name}.json") for name in MEASURED}
    for name, numbers in measured.items():
        if numbers is not None:
            ratio = numbers["compression_ratio"]
            print(f"{name:<16} perplexity {numbers['perplexity']:.3f}, {ratio:.2f} tokens per slot")
    if worse:
        print(f"distillation has not helped: {', '.join(worse)}", file=sys.stderr)
    return int(bool(worse))


def _reports(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _measured(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_bytes()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""How many needles were found, by length and depth; 1 where one was missed.

python examples/long_context_toy/judge.py FOLDER [--least SHARE]

Reads FOLDER/answers.jsonl and the metrics of the longest rows' run, writes FOLDER/needles.png.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from megatron_ext.training.metrics import read_metrics

MOST_BY_CHANCE = 0.25
"""Share of the questions that may be answered rightly where the haystack has no needles."""

Cells = dict[tuple[int, float], list[bool]]
"""By tokens of a prompt and depth of its needle: whether each question was answered rightly."""


def read_answers(path: Path) -> dict[str, Cells]:
    """Those of haystacks with needles, and those of the control."""
    kinds: dict[str, Cells] = {"needles": {}, "control": {}}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        length, depth, value, kind = answer["id"].split()
        right = answer["text"].strip() == value
        kinds[kind].setdefault((int(length), float(depth)), []).append(right)
    return kinds


def axes_of(cells: Cells) -> tuple[list[int], list[float]]:
    """Lengths and depths."""
    return sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})


def table(cells: Cells) -> str:
    """A line for each length, a column for each depth."""
    lengths, depths = axes_of(cells)
    lines = ["tokens  " + "".join(f"{f'at {depth:.0%}':>10}" for depth in depths)]
    for length in lengths:
        counts = (f"{sum(cells[length, depth])} of {len(cells[length, depth])}" for depth in depths)
        lines.append(f"{length:<8,}" + "".join(f"{count:>10}" for count in counts))
    return "\n".join(lines)


def picture(cells: Cells) -> Figure:
    """The table in colours."""
    lengths, depths = axes_of(cells)
    shares = [
        [sum(cells[length, depth]) / len(cells[length, depth]) for length in lengths] for depth in depths
    ]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(image, label="needles found")
    return figure


def main() -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description="How many needles were found.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--least", type=float, default=1.0, help="share that must be found (default: all)")
    options = parser.parse_args()
    kinds = read_answers(options.folder / "answers.jsonl")
    longest = axes_of(kinds["needles"])[0][-1]
    reports = read_metrics(options.folder / f"{longest}-run" / "metrics.jsonl")
    print("loss of long rows:", " ".join(f"{report['lm_loss']:.4f}" for report in reports))
    print(f"needles found\n{table(kinds['needles'])}")
    picture(kinds["needles"]).savefig(options.folder / "needles.png")
    rights = {kind: [right for cell in cells.values() for right in cell] for kind, cells in kinds.items()}
    needles, control = rights["needles"], rights["control"]
    print(
        f"{sum(needles)} of {len(needles)} answers are right; "
        f"without needles in the haystack {sum(control)} of {len(control)}"
    )
    if sum(needles) < options.least * len(needles):
        print(f"at least {options.least:.0%} should be found", file=sys.stderr)
        return 1
    if sum(control) > MOST_BY_CHANCE * len(control):
        print("answers are right that nothing in the haystack gives", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

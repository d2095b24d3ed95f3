"""Perplexities side by side; equal models must have equal ones, and the way there and back must not change a
bit."""

import json
import sys
from pathlib import Path

from safetensors import safe_open

EQUAL = ("huggingface", "megatron-tp1", "megatron-tp3")
SHARED = ("shared-by-copy", "shared-by-average", "shared-by-svd")
_DIGITS = 1e-4


def main(folder: str) -> int:
    """Print a line per model; 1 where something is not as it must be."""
    place = Path(folder)
    found = {
        name: json.loads((place / f"{name}.json").read_bytes())["perplexity"] for name in (*EQUAL, *SHARED)
    }
    for name, value in found.items():
        print(f"{name:<20} perplexity {value:,.4f}")
    problems = [
        f"{name} has perplexity {found[name]:.6f}, {EQUAL[0]} {found[EQUAL[0]]:.6f}"
        for name in EQUAL
        if abs(found[name] - found[EQUAL[0]]) > _DIGITS * found[EQUAL[0]]
    ]
    names = changed(place / "original", place / "back")
    problems += [f"there and back, {name} has changed" for name in names]
    print(
        "there and back      "
        + (f"{len(names)} tensors have changed" if names else " weights bit for bit the same")
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def changed(first: Path, second: Path) -> list[str]:
    """Names of tensors that differ in any bit between two folders of one file each, or are in only one of
    them."""
    with (
        safe_open(first / "model.safetensors", "pt") as one,
        safe_open(second / "model.safetensors", "pt") as other,
    ):
        names, theirs = set(one.keys()), set(other.keys())
        differing = [
            name for name in sorted(names & theirs) if not one.get_tensor(name).equal(other.get_tensor(name))
        ]
        return sorted(names ^ theirs) + differing


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

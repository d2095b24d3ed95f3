"""Draws the curves of one or several runs from their metrics files.

    lckv-megatron plot RUN [RUN ...] --output curves.png

A run is a metrics file (`logging.metrics_file`) or a directory with metrics.jsonl in it. Runs that are still
being written can be drawn too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lckv_megatron.pictures.runs import METRICS_NAME, X_LABELS, read_runs
from megatron_ext.arguments import ProgramParser
from megatron_ext.errors import ConfigError


def _smoothing(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("plot", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help=f"metrics file, or directory with {METRICS_NAME}"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("curves.png"), help="PNG to write (default: %(default)s)"
    )
    parser.add_argument("--x", choices=X_LABELS, default="iteration", help="abscissa (default: %(default)s)")
    parser.add_argument(
        "--smoothing",
        type=_smoothing,
        metavar="SHARE",
        help=(
            "share of the past in each point, in [0, 1), 0 for none (default: the trend around each point of "
            "long curves); the points themselves stay visible behind"
        ),
    )
    parser.add_argument(
        "--start", type=float, default=0, help="abscissa at which curves begin (default: %(default)s)"
    )
    return parser


def draw(options: argparse.Namespace) -> None:
    """Read the runs, then draw them. Raises ConfigError."""
    runs = read_runs(options.runs)
    from lckv_megatron.pictures.curves import LOOK, Style, plot  # with matplotlib: only where there are runs
    from lckv_megatron.pictures.files import write_picture

    style = Style(options.x, options.smoothing, options.start)
    write_picture(lambda: plot(runs, style), LOOK, options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = _parser().parse_args(argv)
    try:
        draw(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

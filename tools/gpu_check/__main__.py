"""What has to be seen once on a GPU, the most valuable first, within a few minutes.

    tools/gpu_check.sh
    tools/gpu_check.sh --minutes 8 --output tools/benchmarks/results/gpu_check.json
    tools/gpu_check.sh --tiny --output /tmp/check.json

Every part is a program of its own: one that fails or hangs does not keep the later ones from running. The
result is one JSON file: hardware, date, versions, and of each part its time, figures and error.
"""

import argparse
import datetime as dt
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.atomic import write_file
from megatron_ext.console import exit_status, set_up_logging
from tools.gpu_check.commands import ROOT, CommandError, Commands, Part
from tools.gpu_check.inputs import ON_GPU, TINY
from tools.gpu_check.parts import PARTS, Check, versions

logger = logging.getLogger(__name__)

RESULTS = ROOT / "tools" / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ProgramParser("gpu-check", __doc__)
    parser.add_argument("--minutes", type=positive, default=8, help="all parts together (default: 8)")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: named by date, with the other results)"
    )
    parser.add_argument("--tiny", action="store_true", help="models so small that a CPU runs all parts")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Run the parts and write the result after each. Raises ArithmeticError where a part failed."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    output = options.output or RESULTS / f"gpu_check_{today}.json"
    chosen = [part for part in PARTS if options.parts is None or part.__name__ in options.parts]
    commands, done = Commands(options.minutes * 60), []
    with tempfile.TemporaryDirectory() as folder:
        check = Check(commands, Path(folder), TINY if options.tiny else ON_GPU, options.tiny)
        for function in chosen:
            done.append(_run_part(check, function))
            result = {"date": today, "hardware": hardware(), "versions": versions(), "tiny": options.tiny}
            result["parts"] = [asdict(part) for part in done]
            write_file(output, json.dumps(result, indent=1).encode())
    logger.info("wrote %s", output)
    if failed := [part.name for part in done if not part.passed]:
        raise ArithmeticError(f"failed: {', '.join(failed)}; see {output}")


def _run_part(check: Check, function) -> Part:  # type: ignore[no-untyped-def]
    part, started = Part(function.__name__), time.monotonic()
    try:
        part.figures = function(check)
        part.passed = True
    except (CommandError, OSError, ValueError, KeyError) as error:
        part.error = f"{type(error).__name__}: {error}"
    part.seconds = round(time.monotonic() - started, 1)
    state = "passed" if part.passed else f"FAILED\n{part.error}"
    logger.info("%-16s %6.1f s  %s", part.name, part.seconds, state)
    return part


def hardware() -> str:
    """The GPU's name as its driver says it, or that there is none."""
    if shutil.which("nvidia-smi") is None:
        return "no GPU"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() or "no GPU"


if __name__ == "__main__":
    sys.exit(main())

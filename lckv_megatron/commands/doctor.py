"""Says what this machine has for training, and what is missing.

    lckv-megatron doctor [--json]

It also says which path each operation will take here, and how to get what is missing. Exit status: 0 when
training can run here (on GPUs or on the CPU), else 1.
"""

import sys
import warnings
from collections.abc import Sequence

from lckv_megatron.diagnosis import as_json, as_text, examine
from megatron_ext.arguments import ProgramParser


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ProgramParser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of optional packages: said better below
        report = examine()
    print(as_json(report) if options.json else "\n".join(as_text(report)))
    return 0 if report.can_train else 1


if __name__ == "__main__":
    sys.exit(main())

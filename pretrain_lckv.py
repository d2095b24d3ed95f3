"""Pretrains a language model whose KV cache is small by construction.

    torchrun --nproc-per-node 8 pretrain_lckv.py --config run.yaml --parallel.tensor_model_parallel_size 4
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_ext.command_line import parse_run_config
from megatron_ext.errors import ConfigError
from megatron_ext.validation import validate


def main(argv: Sequence[str] | None = None) -> int:
    """Load the configuration, validate it, train. Returns the exit status."""
    set_up_logging(rank=int(os.environ.get("RANK", "0")))
    run = parse_run_config(argv)
    try:
        validate(run, int(os.environ.get("WORLD_SIZE", "1")))
        # torch is loaded here: --help and bad settings are answered at once
        from megatron_ext.parallel.process_groups import destroy, initialize
        from megatron_ext.training.loop import fit

        initialize(run.parallel, run.train.seed)
        fit(run)
        destroy()
    except (ConfigError, ArithmeticError) as error:
        logging.getLogger(__name__).error("error: %s", error)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def set_up_logging(rank: int) -> None:
    """Rank 0 says what happens, other ranks what goes wrong; what libraries remark on the way is left out."""
    prefix = "" if rank == 0 else f"rank {rank}: "
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", force=True)
    for library in ("megatron.core", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")


if __name__ == "__main__":
    sys.exit(main())

"""Pretrains a language model whose KV cache is small by construction.

torchrun --nproc-per-node 8 pretrain_lckv.py --config run.yaml --parallel.tensor_model_parallel_size 4
"""

import os
import sys
from collections.abc import Sequence

from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.launch import world_size
from megatron_ext.parallel.flight_recorder import switch_on
from megatron_ext.signals import handling, ignore_all
from megatron_ext.validation.run import validate


def main(argv: Sequence[str] | None = None) -> int:
    """Load the configuration, then validate it and train. Returns the exit status."""
    run = parse_run_config(argv)
    set_up_logging()
    return exit_status(lambda: train(run))


def train(run: RunConfig) -> None:
    """Train from the first to the last iteration, on the processes that torchrun started."""
    validate(run, world_size(os.environ))
    if run.train.deterministic:  # cuBLAS and NCCL read these when they start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    switch_on(run, os.environ)
    # torch is loaded only here: --help and bad settings are answered at once
    from checkpoints_conversion.for_training import open_for_training
    from megatron_ext.parallel.process_groups import destroy, initialize
    from megatron_ext.training.loop import fit

    initialize(run.parallel, run.train.seed)
    fit(run, open_for_training)
    with handling(lambda number, frame: None):  # the work is safe: a signal that comes late changes nothing
        destroy()


if __name__ == "__main__":
    status = main()
    ignore_all()  # Python takes seconds to end
    sys.exit(status)

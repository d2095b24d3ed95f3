"""The Megatron side of a proof: logits of a checkpoint's model in float32, on any layout, written to a file
row by row.

It runs in processes of its own, as many as the layout needs, started as torchrun would start them and under a
time-out: Megatron without CUDA changes torch for its whole process (`megatron_ext/cpu.py`), and takes memory
that only an end of the process gives back.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from lckv.precision import exact_products
from lckv.weights.tensors import dtype_of
from megatron_ext.config import ParallelConfig, RunConfig, TrainConfig
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.evaluation import logits_file
from megatron_ext.parallel.process_groups import destroy, initialize
from megatron_ext.restoring.model import restore
from megatron_ext.validation.layout import layout_problems

_FLOAT32 = TrainConfig(precision="fp32")
_SHOWN_LINES = 12


def check_layout(description: ModelDescription, parallel: ParallelConfig) -> None:
    """Raises ConversionError where the model cannot be laid out as `parallel` says."""
    run = RunConfig(
        model=description.model, compression=description.compression, parallel=parallel, train=_FLOAT32
    )
    if problems := layout_problems(run):
        raise ConversionError("\n".join(problems))


def compute(
    checkpoint: Path,
    tokens: np.ndarray,
    output: Path,
    parallel: ParallelConfig,
    weights_dtype: torch.dtype,
    *,
    layer_types: str | None = None,
    timeout_seconds: float,
) -> None:
    """Write float32 [B, T, true vocabulary] for `tokens` int64 [B, T] to `output`, a .npy file.

    `checkpoint` is one checkpoint, whose files are good; its weights are rounded to `weights_dtype`. The
    layout is one that `check_layout` accepts. `layer_types`: the map, of a family.
    Raises ConversionError where processes fail or do not end in time.
    """
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    with TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens)
        files = [str(checkpoint), f"{folder}/tokens.npy", str(output)]
        arguments = [*files, str(weights_dtype), *map(str, sizes)]
        arguments += [] if layer_types is None else ["--layer-types", layer_types]
        _run_processes(sizes[0] * sizes[1], arguments, timeout_seconds)


def write_logits(
    checkpoint: Path,
    tokens: np.ndarray,
    output: Path,
    parallel: ParallelConfig,
    weights_dtype: torch.dtype,
    layer_types: str | None = None,
) -> None:
    """Every process of the layout calls it; see `compute`."""
    initialize(parallel, seed=1)
    stage = restore(checkpoint, parallel, layer_types=layer_types, verify_hashes=False, in_float32=True).stage
    round_weights(stage, weights_dtype)
    with exact_products():
        logits_file.write_logits(stage, tokens, output)


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give float32 weights the values that they have in `dtype`."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _run_processes(processes: int, arguments: Sequence[str], timeout_seconds: float) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    started = subprocess.Popen(
        [sys.executable, *launcher, "-m", "checkpoints_conversion.megatron_logits", *arguments],
        env=_environment(processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = started.communicate(timeout=timeout_seconds)
    except BaseException as error:
        _kill(started)
        started.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ConversionError(
                f"Megatron's logits were not there after {timeout_seconds:g} seconds; give its {processes} "
                "process(es) more time (--timeout), or fewer tokens."
            ) from None
        raise
    if started.returncode:
        lines = "\n".join(f"  {line}" for line in said.splitlines()[-_SHOWN_LINES:])
        raise ConversionError(
            f"Megatron's logits could not be computed by {processes} process(es). Their last lines:\n{lines}"
        )


def _kill(started: subprocess.Popen[str]) -> None:
    """End a process and all that it has started; torchrun's ranks are sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(started.pid)
        parent.suspend()  # it starts no more
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _environment(processes: int) -> dict[str, str]:
    """That of this program, without what torchrun may have set for it, and with this package in reach."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    return environment


def main(argv: Sequence[str] | None = None) -> int:
    """One process of a layout. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "tokens", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("weights_dtype")
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        parser.add_argument(name, type=int)
    parser.add_argument("--layer-types")
    options = parser.parse_args(argv)
    set_up_logging()

    def run() -> None:
        parallel = ParallelConfig(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        )
        dtype = dtype_of(options.weights_dtype, "weights_dtype")
        tokens = np.load(options.tokens)
        write_logits(options.checkpoint, tokens, options.output, parallel, dtype, options.layer_types)
        destroy()

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())

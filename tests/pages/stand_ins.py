"""The programs that a page calls, as they are in the tests.

`lckv-megatron`, `torchrun` and `python` are the real programs, started warm (`warm_python`) or cold. Slurm
and the Hub are replaced (`REPLACED`), with everything that can be checked without them.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).parent / "cluster"

REPLACED = {
    "hf": "no network: options are read by the real command, files come from a folder of the test",
    "sbatch": "no Slurm: runs the script here, a job array one task after the other",
    "srun": "no Slurm, no containers: runs its command here, as node 0",
    "scontrol": "no Slurm: there is one host, this one",
}
"""Programs that are not run themselves, and why. All others are."""


@contextmanager
def stand_ins(folder: Path, *, hub: Path, cold: bool = False) -> Iterator[dict[str, str]]:
    """Makes `folder`/bin; yields an environment in which pages run. Python is warm unless `cold`."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    python = shlex.quote(sys.executable)
    socket = folder / "warm"
    asked = f"exec {python} -S -E {shlex.quote(str(ROOT / 'tests/pages/ask.py'))} {socket} {python}"
    here = f"exec {shlex.quote(str(programs / 'python'))} -m"
    bodies = {
        "python": f'{f"exec {python}" if cold else asked} "$@"',
        "lckv-megatron": f'{here} lckv_megatron "$@"',
        "torchrun": f'{here} torch.distributed.run "$@"',
        "hf": f'{here} tests.pages.hub {shlex.quote(str(hub))} "$@"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{CLUSTER}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),  # or scripts take that of `make PYTHON=...`
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VENV": str(folder),
        "GPUS_PER_NODE": "1",
    }
    if cold:
        yield environment
        return
    command = [sys.executable, "-m", "tests.pages.warm_python", str(socket), str(programs / "python")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as warm:
        assert warm.stdout is not None
        try:
            assert warm.stdout.readline() == "ready\n"
            yield environment
        finally:
            os.killpg(warm.pid, signal.SIGKILL)  # and the forks that are left: all are of its session

"""A Python that has imported everything already: each process that asks for one is a fork of it.

A page starts dozens of Python processes, each of which would import torch, transformers and Megatron for ten
seconds. Here they are imported once. `python` in the stand-ins' folder is `ask.py`: it hands its arguments,
folder, environment and standard streams to this process, which forks. The fork is a process of its own, with
modules that nobody has used yet, as after a start.

    python -m tests.pages.warm_python SOCKET PYTHON      PYTHON: what a fork starts as sys.executable
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

_IMPORTED = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "torch.distributed.run",
    "megatron_ext.training.loop",
    "megatron_ext.restoring.model",
    "checkpoints_conversion.convert",
    "lckv_megatron.__main__",
    "lckv.serving.app",
    "uvicorn",
    "matplotlib.pyplot",
)
"""Importing them has no effect, which tests/test_layering.py holds for our own."""


def serve(path: str) -> None:
    """Answer requests until this process is killed."""
    for name in _IMPORTED:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: their clients get the status
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Be the process that was asked for; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        with connection.makefile("rb") as lines:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            request = json.loads(lines.readline())
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        connection.sendall(b"%d\n" % os.getpid())
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        status = run(request["arguments"])
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(b"%d\n" % status)
        os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """As `python ARGUMENTS` does it, for -m MODULE and for scripts."""
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
    words = [word for word in arguments if word != "-u"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.executable = sys.argv[2]
    serve(sys.argv[1])

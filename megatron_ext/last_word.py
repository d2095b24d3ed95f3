"""Says a line once more where torchrun says much.

When a process fails, or torchrun gets a signal, torchrun prints some 25 lines of its own after all that the
processes have said. None of them can be kept back from here. So torchrun is given the line, which it shows as
the root cause, and the line is written again when torchrun has ended, by a process that outlives it:
python last_word.py PID LINE.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that torchrun passes on, and says much about when the processes have ended."""

_PATIENCE_SECONDS = 60.0


def say_last(line: str, environment: Mapping[str, str] = os.environ) -> None:
    """Have `line` shown by torchrun and behind it. Without torchrun, or where it will start the processes
    again, nothing happens."""
    attempts = [environment.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if "TORCHELASTIC_RUN_ID" not in environment or attempts[0] != attempts[1]:
        return
    if "TORCHELASTIC_ERROR_FILE" in environment:
        details = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(environment["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": details}}, file)
    subprocess.Popen(
        [sys.executable, "-I", __file__, str(os.getppid()), line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_for_end(pid: int) -> bool:
    """Whether the process ended in time, at the moment when it did."""
    if not hasattr(os, "pidfd_open"):
        return False
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([descriptor], [], [], _PATIENCE_SECONDS)
    return bool(ended)


if __name__ == "__main__" and _wait_for_end(int(sys.argv[1])):
    sys.stderr.write(f"{sys.argv[2]}\n")

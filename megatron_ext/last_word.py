"""Says a line again when torchrun has ended: torchrun prints some 25 lines of its own about a failure, after
everything that the processes it started may say.

Run as a script, in a process and session of its own: python last_word.py PID LINE.
"""

import os
import subprocess
import sys
import time

_PATIENCE_SECONDS = 60.0


def say_last(line: str) -> None:
    """Have `line` written to stderr behind what torchrun prints at its end. Without torchrun, or where it
    will start the processes again, nothing happens."""
    attempts = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or attempts[0] != attempts[1]:
        return
    subprocess.Popen(
        [sys.executable, "-I", __file__, str(os.getppid()), line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_for_end(pid: int) -> bool:
    """Whether the process ended in time; one that nobody has asked for its status has."""
    import psutil  # not needed to start another process

    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


if __name__ == "__main__" and _wait_for_end(int(sys.argv[1])):
    sys.stderr.write(sys.argv[2] + "\n")

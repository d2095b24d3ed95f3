"""A process as the owner of files on a file system that several machines may share."""

import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_PROCESSES = Path("/proc")
_ZOMBIE = "Z"
_END_OF_PIDS = 2**31
_TOKEN = re.compile(r"(\w+)-(\d+)-(\d+)")
TOKEN_PATTERN = r"\w+-\d+-\d+"
"""What `Owner.token` looks like."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from later ones with the same number."""

    host: str
    machine: str
    """Boot and process namespace: within it a pid means one process. Empty where the system does not say."""
    pid: int
    started: int
    """Start of the process in clock ticks after the boot; 0 where the system does not say it."""
    since: float
    """When it became the owner, in seconds since 1970 by its own clock; only for people to read."""
    slurm_job: str | None
    """Cluster and job, if there is one."""
    slurm_restarts: int
    """How often Slurm has requeued the job."""

    @property
    def token(self) -> str:
        """The process in a file name."""
        return f"{_word(self.host)}-{self.pid}-{self.started}"

    def is_same_process(self, other: "Owner") -> bool:
        """Whether both are one process."""
        return (self.host, self.machine, self.pid, self.started) == (
            other.host,
            other.machine,
            other.pid,
            other.started,
        )

    def is_on_machine_of(self, other: "Owner") -> bool:
        """Whether each can see whether the other lives."""
        return bool(self.machine) and (self.host, self.machine) == (other.host, other.machine)

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {when}"

    def to_json(self) -> bytes:
        """The inverse of `read_owner`."""
        return json.dumps(asdict(self), indent=1).encode()


def this_process() -> Owner:
    """The process that calls this."""
    job = os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or 0,
        since=time.time(),
        slurm_job=job and f"{os.environ.get('SLURM_CLUSTER_NAME', '')}:{job}".lstrip(":"),
        slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def read_owner(content: bytes) -> Owner | None:
    """The owner that `content` describes; None where it describes none."""
    try:
        fields = json.loads(content)
        if not 0 < int(fields["pid"]) < _END_OF_PIDS:
            return None
        return Owner(
            host=str(fields["host"]),
            machine=str(fields["machine"]),
            pid=int(fields["pid"]),
            started=int(fields["started"]),
            since=min(max(0.0, float(fields["since"])), 1e11),
            slurm_job=fields["slurm_job"] and str(fields["slurm_job"]),
            slurm_restarts=int(fields["slurm_restarts"]),
        )
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def is_gone(owner: Owner, here: Owner) -> bool | None:
    """Whether the process `owner` has ended, as the process `here` can tell; None where it cannot."""
    if owner.is_on_machine_of(here):
        return None if _is_hidden(owner.pid) else _start_of(owner.pid) != owner.started
    if owner.slurm_job is not None and owner.slurm_job == here.slurm_job:
        # Slurm ends all processes of a job before it starts the job again.
        return True if owner.slurm_restarts < here.slurm_restarts else None
    return None


def is_living_token(token: str, here: Owner) -> bool:
    """Whether `token` is that of another process on this host that still runs."""
    match = _TOKEN.fullmatch(token)
    if match is None or token == here.token or match[1] != _word(here.host):
        return False
    return _start_of(int(match[2])) == int(match[3])


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot; None where there is no such process, or it is
    only waiting to be forgotten."""
    try:
        stat = (_PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return int(fields[18]) if state != _ZOMBIE else None


def _is_hidden(pid: int) -> bool:
    """Whether a process may be there that the system does not let this one see."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not (_PROCESSES / str(pid)).exists()
    except ProcessLookupError:
        return False
    return False


def _machine() -> str:
    try:
        boot = (_PROCESSES / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink(_PROCESSES / 'self/ns/pid')}"
    except (OSError, ValueError):
        return ""


def _word(host: str) -> str:
    return re.sub(r"\W", "_", host, flags=re.ASCII) or "_"

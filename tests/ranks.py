"""Runs an ordinary function on every rank of a process group, for tests of distributed code.

One pool of processes per world size is started when it is first needed, serves every later case of the
session, and ends with it. Each case gets a fresh world group. A rank that raises, dies or hangs fails its own
case only: where the others do not come to an end, the pool is killed and the next case starts a new one.

    parent --(pickled function, args)--> rank 0 .. n-1  one pipe per rank; pickle: tensors travel by value
    parent <--(ok, result | exception)-- rank 0 .. n-1
    parent --(empty: clean up)---------> rank 0 .. n-1  only after every rank has answered
    parent <--(ok)---------------------- rank 0 .. n-1
"""

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "cuda"]

START_TIMEOUT_SECONDS = 180.0
GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed."""
CLEAN_UP_TIMEOUT_SECONDS = 60.0
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
PRELOADED = [
    "pytest",
    "torch",
    "megatron.core.parallel_state",
    "megatron.core.rerun_state_machine",
    "megatron.core.optimizer",
]
HIDDEN_GPUS_VARIABLE = "LCKV_TESTS_CUDA_VISIBLE_DEVICES"
"""What CUDA_VISIBLE_DEVICES was before conftest.py hid the GPUs from everything but `device="cuda"`."""
MAX_IDLE_PROCESSES = 8
"""Pools that have not been used for longest end when a new one would bring the number of processes above
this."""


class RankError(RuntimeError):
    """A rank failed without an exception of its own to show: it died, or its exception or result cannot be
    pickled."""


class RankTimeoutError(TimeoutError):
    """Some ranks did not answer in time; the message shows where each of them was."""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180, device: Device = "cpu"
) -> list[Any]:
    """Calls `function(*args)` in every process of a group of `world_size` ranks; returns the results in rank
    order.

    `function` is defined at module level (it is pickled by name); arguments and results are pickled. Inside,
    torch.distributed is initialised (gloo on the loopback interface; with device="cuda" also NCCL, one GPU
    per rank), `megatron_ext.cpu.install()` has been called, and no model parallelism is initialised; what the
    function initialises is destroyed afterwards. Once per pool, a function may destroy the world group and
    make another one from torchrun's variables.

    Raises the first exception that a rank raised, with that rank's traceback as a note; RankError when a rank
    died; RankTimeoutError when the ranks did not end within `timeout` seconds.
    """
    request = pickle.dumps((function, args))
    return _pool(world_size, device).run(request, timeout)


class _Pool:
    """The processes of one world size."""

    def __init__(self, world_size: int, device: Device) -> None:
        import torch.distributed as dist

        self.world_size = world_size
        self.alive = True
        # Bound to a port that the system chooses, here, where it stays bound: nobody can take it in between.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stacks = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        try:
            for rank in range(world_size):
                self._start(rank, device)
            self._raise_failure(self._answers(START_TIMEOUT_SECONDS, "start"))
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: int, device: Device) -> None:
        context = _context(device)
        ours, theirs = context.Pipe()
        arguments = (rank, self.world_size, self._store.port, device, str(self._stacks / str(rank)), theirs)
        # Not daemonic: daemonic processes may not have children, and checkpoint writers and data loaders are
        # such.
        process = context.Process(target=_serve, args=arguments, name=f"rank {rank} of {self.world_size}")
        process.start()
        theirs.close()
        self._processes.append(process)
        self._connections.append(ours)

    def run(self, request: bytes, timeout: float) -> list[Any]:
        """Runs one case; see `run_on_ranks`."""
        try:
            answers = self._ask(request, timeout, "answer")
            if len(answers) == self.world_size and not all(self._clean_up()):
                self.kill()
        except (
            BaseException
        ):  # also a time-out of pytest's or Ctrl-C: the ranks are in the middle of something
            self.kill()
            raise
        if len(answers) < self.world_size:
            self.kill()
        self._raise_failure(answers)
        return [answers[rank][1] for rank in range(self.world_size)]

    def _clean_up(self) -> list[bool]:
        try:
            answers = self._ask(b"", CLEAN_UP_TIMEOUT_SECONDS, "clean up")
        except RankTimeoutError:
            return [False]
        return [ok for ok, _ in answers.values()]

    def _ask(self, message: bytes, timeout: float, duty: str) -> dict[int, tuple[bool, Any]]:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that died is reported where its answer is missed
                connection.send_bytes(message)
        return self._answers(timeout, duty)

    def _answers(self, timeout: float, duty: str) -> dict[int, tuple[bool, Any]]:
        """(ok, result or failure) by rank, in order of arrival; after a failure, of those that answer within
        the grace."""
        deadline = time.monotonic() + timeout
        pending: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        answers: dict[int, tuple[bool, Any]] = {}
        failed = False
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready and not failed:
                raise RankTimeoutError(self._describe_stuck(list(pending.values()), timeout, duty))
            if not ready:
                break
            for connection in ready:
                rank = pending.pop(connection)
                answers[rank] = self._receive(rank)
                if not answers[rank][0] and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            ok, value = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(GRACE_SECONDS)
            return False, (
                RankError(f"rank {rank} of {self.world_size} died (exit code {process.exitcode})"),
                "",
            )
        return ok, value

    def _raise_failure(self, answers: dict[int, tuple[bool, Any]]) -> None:
        for rank, (ok, value) in answers.items():
            if not ok:
                exception, trace = value
                if trace:
                    exception.add_note(f"Traceback of rank {rank} of {self.world_size}:\n{trace}")
                missing = sorted(set(range(self.world_size)) - set(answers))
                if missing:
                    exception.add_note(
                        f"Ranks {missing} were still waiting {GRACE_SECONDS:g} s later and were killed."
                    )
                raise exception

    def _describe_stuck(self, ranks: list[int], timeout: float, duty: str) -> str:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)  # type: ignore[arg-type]
        time.sleep(0.5)  # for faulthandler to write
        lines = [f"ranks {ranks} of {self.world_size} did not {duty} within {timeout:g} s"]
        for rank in ranks:
            stack = self._stacks / str(rank)
            lines.append(f"rank {rank}:\n{stack.read_text() if stack.exists() else '(has not started)'}")
        return "\n".join(lines)

    def kill(self) -> None:
        """Ends the processes, with all that they have started."""
        self.alive = False
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # when it has no session of its own yet
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        for process in self._processes:
            process.join(GRACE_SECONDS)
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._stacks, ignore_errors=True)


def _context(device: Device) -> Any:
    """How processes are started: forked from one that has imported torch and Megatron, and has no threads
    yet.

    So a pool starts in a fraction of a second instead of seconds per process. Not with CUDA, which does not
    survive a fork.
    """
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


_pools: dict[tuple[int, Device], _Pool] = {}
"""Living pools, the least recently used first."""


def _pool(world_size: int, device: Device) -> _Pool:
    pool = _pools.pop((world_size, device), None)
    if pool is None or not pool.alive:
        while _pools and sum(other.world_size for other in _pools.values()) + world_size > MAX_IDLE_PROCESSES:
            _pools.pop(next(iter(_pools))).kill()
        pool = _Pool(world_size, device)
    _pools[(world_size, device)] = pool
    return pool


@atexit.register
def kill_pools() -> None:
    """Ends every pool; the next call of `run_on_ranks` starts a new one."""
    while _pools:
        _pools.popitem()[1].kill()


# Below: in the processes of the pool.


def _serve(rank: int, world_size: int, port: int, device: Device, stack: str, connection: Connection) -> None:
    os.setsid()  # a session of its own, so that it can be killed together with its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stack_file = open(stack, "w")  # noqa: SIM115 - closed by its owner
    faulthandler.register(signal.SIGUSR1, file=stack_file)
    faulthandler.enable()  # a rank that crashes says where
    case = 0
    try:
        _prepare(rank, world_size, port, device)
        # torch and Megatron stay: looking through them after each case costs more than most cases.
        gc.freeze()
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        connection.send_bytes(pickle.dumps((True, None)))
    except BaseException as error:
        connection.send_bytes(_failure(error))
        return
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv_bytes()
            case += 1
            if request:
                os.environ["TORCHELASTIC_RESTART_COUNT"] = str(
                    case
                )  # keeps a group that the case makes itself apart
                group_store = dist.PrefixStore(f"case{case}", store)
                connection.send_bytes(_run_case(request, rank, world_size, device, group_store))
            else:
                connection.send_bytes(_answer(_clean_up))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(rank: int, world_size: int, port: int, device: Device) -> None:
    """Sets the environment that torchrun would set, before torch is imported, and prepares Megatron."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # Rank 0 joins the parent's store and does not try to start one.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": loopback,
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
    )
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif HIDDEN_GPUS_VARIABLE in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[HIDDEN_GPUS_VARIABLE]
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    import torch

    from megatron_ext import cpu

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    cpu.install()


def _run_case(request: bytes, rank: int, world_size: int, device: Device, store: Any) -> bytes:
    import torch
    import torch.distributed as dist

    def case() -> Any:
        function, args = pickle.loads(request)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
        torch.manual_seed(0)  # no case depends on the one before
        return function(*args)

    return _answer(case)


def _answer(function: Callable[[], Any]) -> bytes:
    try:
        result = function()
    except BaseException as error:  # SystemExit too: the pool outlives the case
        return _failure(error)
    try:
        return pickle.dumps((True, result))
    except Exception as error:
        return _failure(RankError(f"the result of type {type(result).__name__} cannot be pickled: {error}"))


def _failure(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(error))
    with contextlib.suppress(Exception):
        answer = pickle.dumps((False, (error, trace)))
        pickle.loads(answer)  # some exceptions can be pickled but not unpickled
        return answer
    return pickle.dumps((False, (RankError(f"{type(error).__name__}: {error}"), trace)))


def _clean_up() -> None:
    """Undoes what a case left: model parallelism, every process group, and Megatron's global state."""
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    parallel_state.destroy_model_parallel()
    get_cuda_rng_tracker().reset()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    destroy_rerun_state_machine()
    if dist.is_initialized():
        dist.destroy_process_group()  # all groups: gloo's sockets and threads would add up
    gc.collect()

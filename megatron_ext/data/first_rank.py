"""Work that rank 0 does while the other ranks wait, however long it takes,
without a collective that could time out."""

import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    _get_default_store,
)  # there is no public way to the group's store

from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 2.0


def on_first_rank(work: Callable[[], Any], *, what: str, timeout_minutes: float, timeout_setting: str) -> Any:
    """Result of `work()`, which rank 0 alone does, on every rank. The result must be plain JSON. All ranks
    must call this.

    While they wait, the other ranks log every 30 s what for, and for whom (rank 1 as a warning, the others as
    information). If the work fails, they fail at once too, with its message: ConfigError if it was one, else
    RuntimeError. After `timeout_minutes` (the value of the setting `timeout_setting`) they raise
    TimeoutError. If rank 0 dies and the store with it, they raise RuntimeError.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    rank = dist.get_rank()
    store = dist.PrefixStore(f"first_rank/{what}", _get_default_store())
    call = store.add(f"calls of rank {rank}", 1)  # the same on every rank, since all call this equally often
    if rank == 0:
        return _work(work, store, call)
    try:
        outcome = _wait(store, call, what, timeout_minutes, timeout_setting)
    except dist.DistError as error:
        raise RuntimeError(f"rank {rank} lost rank 0, which was to make the {what}: {error}") from error
    if "error" in outcome:
        if outcome["setting"]:
            raise ConfigError(outcome["error"])
        raise RuntimeError(f"rank 0 could not make the {what}: {outcome['error']}")
    return outcome["result"]


def _work(work: Callable[[], Any], store: dist.Store, call: int) -> Any:
    store.set(f"worker {call}", f"rank 0 on {socket.gethostname()}")
    try:
        result = work()
        store.set(f"outcome {call}", json.dumps({"result": result}))
    except BaseException as error:
        setting = isinstance(error, ConfigError)
        message = str(error) if setting else f"{type(error).__name__}: {error}"
        store.set(f"outcome {call}", json.dumps({"error": message, "setting": setting}))
        raise
    return result


def _wait(
    store: dist.Store, call: int, what: str, timeout_minutes: float, timeout_setting: str
) -> dict[str, Any]:
    begin = time.monotonic()
    next_log, pause = _LOG_EVERY_SECONDS, 0.01
    while not store.check([f"outcome {call}"]):
        waited = time.monotonic() - begin
        if waited > 60 * timeout_minutes:
            raise TimeoutError(
                f"rank {dist.get_rank()} has waited {waited / 60:.3g} minutes for the {what}, "
                f"{_who(store, call)}. If that takes so long, raise {timeout_setting} ({timeout_minutes:g})."
            )
        if waited >= next_log:
            next_log += _LOG_EVERY_SECONDS
            level = logging.WARNING if dist.get_rank() == 1 else logging.INFO
            logger.log(
                level,
                "waiting for the %s, %s: %.0f s of %.0f s",
                what,
                _who(store, call),
                waited,
                60 * timeout_minutes,
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    return json.loads(store.get(f"outcome {call}"))


def _who(store: dist.Store, call: int) -> str:
    if store.check([f"worker {call}"]):
        return f"which {store.get(f'worker {call}').decode()} is making"
    return "which rank 0 has not begun to make"
